"""The plugin of the command `llm` (https://llm.datasette.io): the runs in checkpoints/ as models.

The command imports this file whenever it starts, so torch is imported when a prompt is executed.
"""

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import llm
from pydantic import Field

from seqlm.config import CHARS, DOCUMENT_CHARS
from seqlm.errors import SeqlmError, UsageError
from seqlm.store import runs


class RunModel(llm.Model):
    """A run as a model of `llm`.  It continues the prompt, so there are no conversations."""

    can_stream = True
    supports_conversation = False

    class Options(llm.Options):
        """The options of `seqlm generate` that concern sampling; seqlm checks the ranges."""

        chars: int | None = Field(
            None, description=f"Characters to generate. Default: {CHARS}, or one document."
        )
        temperature: float = Field(
            1.0, description="0: always the most likely symbol; above 1: more random."
        )
        top_k: int = Field(0, description="Sample from the K most likely symbols; 0: from all.")
        top_p: float = Field(
            1.0, description="Sample from the most likely symbols with total probability P."
        )
        min_p: float = Field(
            0.0, description="Sample from symbols at least P times as likely as the best."
        )
        seed: int | None = Field(
            None, description="Random seed: repeats a text. Default: a new one."
        )

    def __init__(self, path: Path):
        self.path, self.model_id = path, f"seqlm/{path.name}"

    def __str__(self) -> str:
        return f"seqlm: {self.model_id}"

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        """Pieces of the text behind the prompt; the log keeps the step and the seed."""
        import seqlm

        options = prompt.options.model_dump()
        if options["seed"] is None:
            options["seed"] = secrets.randbelow(2**31)
        try:
            if prompt.system:
                raise UsageError("A run reads no system prompt. Put the text into the prompt.")
            run = seqlm.load(self.path, device="auto")
            if options["chars"] is None:
                options["chars"] = CHARS if run.tokenizer.end is None else DOCUMENT_CHARS
            response.response_json = {"step": run.step, "seed": options["seed"]}
            yield from run.stream(prompt.prompt, **options)
        except SeqlmError as error:
            raise llm.ModelError(str(error)) from error


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    for path in runs.existing():
        register(RunModel(path))
