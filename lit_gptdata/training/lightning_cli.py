"""LightningCLI for GPT and GPTDataModule: `python -m lit_gptdata.training.lightning_cli fit --help`."""

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_gptdata._checks import accepted
from lit_gptdata.datamodule import GPTDataModule
from lit_gptdata.model.gpt import GPT
from lit_gptdata.model.stem import EmbeddingStem
from lit_gptdata.text.formats import needs

needs("jsonargparse", "cli", "LightningCLI")


class GPTCLI(LightningCLI):
    """LightningCLI with options for the stem, which takes its vocabulary and length from the data."""

    def __init__(self, model: Any = GPT, data: Any = GPTDataModule, **options: Any) -> None:
        super().__init__(model, data, **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(EmbeddingStem, "stem")
        parser.link_arguments("stem", "model.stem", apply_on="instantiate")
        parser.link_arguments("data.vocab_size", "stem.vocab_size", apply_on="instantiate")
        parser.link_arguments("data.max_length", "stem.max_length")
        if "eot" in accepted(self._model_class):  # the separator of documents
            parser.link_arguments("data.eot", "model.eot", apply_on="instantiate")


if __name__ == "__main__":
    GPTCLI()
