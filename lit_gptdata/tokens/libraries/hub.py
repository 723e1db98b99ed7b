"""Download the tokenizer of a model on the Hugging Face Hub once, into a folder named by its commit.

hf://org/name[@revision]  →  <folder>/org--name/<commit>/tokenizer.json
"""

import re
from pathlib import Path

from lit_gptdata._io import write_whole
from lit_gptdata.text.formats import needs

CONFIG = "tokenizer_config.json"
MODELS = ("tokenizer.json", "tokenizer.model")  # the same tokenizer in two formats


def check_hub_name(name: str) -> tuple[str, str]:
    """The repository and the revision of hf://org/name[@revision]; ValueError for another name."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if match is None:
        raise ValueError(f"{name!r} must be hf://org/name or hf://org/name@revision")
    return match[1], match[2] or "main"


def find_on_hub(name: str, folder: Path) -> tuple[Path, str]:
    """The folder with the files of a tokenizer, and its name with the commit.

    A name without a revision is resolved once per `folder`, and later runs take the same commit. Raises
    ValueError for another name, ImportError, OSError that names the address.
    """
    repository, revision = check_hub_name(name)
    home = folder / repository.replace("/", "--")
    record = home / f"{revision.replace('/', '--')}.commit"
    commit = record.read_text() if record.is_file() else revision  # or a branch
    if not any((home / commit / file).is_file() for file in MODELS):
        commit = _download(repository, commit, home)
        if commit != revision:
            write_whole(record, commit.encode())
    return home / commit, f"hf://{repository}@{commit}"


def _download(repository: str, revision: str, home: Path) -> str:
    """Download the files of a tokenizer; returns the commit."""
    hub = needs("huggingface_hub", "tokenizers", f"hf://{repository}")
    try:
        info = hub.model_info(repository, revision=revision)
        existing = {sibling.rfilename for sibling in info.siblings or ()}
        # the model comes last: where it exists, the download was complete
        files = [CONFIG, *[model for model in MODELS if model in existing][:1]]
        for file in filter(existing.__contains__, files):
            hub.hf_hub_download(repository, file, revision=info.sha, local_dir=home / info.sha)
    except Exception as error:  # of the package itself, of requests or of httpx, by its version
        hint = "check the name, the network and HF_TOKEN, or give a tokenizer.json"
        problem = f"hf://{repository}@{revision} cannot be downloaded: {' '.join(str(error).split())}"
        raise ConnectionError(f"{problem}. {hint}") from error
    if len(files) < 2:
        raise FileNotFoundError(f"hf://{repository}@{info.sha} has neither {' nor '.join(MODELS)}")
    return str(info.sha)
