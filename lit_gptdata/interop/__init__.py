"""Token files of other programs. Both directions keep every id.

files ──read──▶ blocks of ids ──importing──▶ TokenStore ──exporting──▶ blocks ──write──▶ files
"""
