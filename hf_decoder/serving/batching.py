"""Writes the texts of waiting requests together, one row each, if they ask for the same settings.

A step of several rows reads each weight once. A row ends by itself, and its client does not wait for the other rows.
Requests that come meanwhile wait for the next batch. Importing this module needs the packages of the extra `serve`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.cli.serving.utils import GenerateManager, _GenerationCancelled
from transformers.utils import logging

from hf_decoder.engine.decoding.cpp_step import CppStep
from hf_decoder.engine.decoding.row_batches import PAD, left_padded, may_be_rows
from hf_decoder.model.modeling_hf_decoder import HfDecoderForCausalLM

logger = logging.get_logger(__name__)

MAX_ROWS = {"cpu": CppStep.max_rows, "cuda": 32}
MAX_CONTEXTS = 4  # the most tokens of a batch, prompts and answers, in contexts of the model
FREE_PADDING = 1024  # tokens in a batch; more than that is at most half of the prompts themselves


class Written(NamedTuple):
    """What a job has come to."""

    ids: torch.Tensor  # (n,), without the prompt
    ended: bool  # by a token that ends a text, or by a stop string
    logits: torch.Tensor | None  # (n, V)


@dataclass(eq=False)
class Job:
    """One text to write. `done` is called once, on the thread that generates, with what it came to."""

    model: Any
    processor: Any
    inputs: dict[str, Any]  # of `generate`; one row
    config: GenerationConfig
    done: Callable[[Written | Exception], None]
    seed: int | None = None
    needs_logits: bool = False
    streamer: Any = None

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[-1]

    @property
    def ends(self) -> set[int]:
        ends = self.config.eos_token_id
        ends = self.model.generation_config.eos_token_id if ends is None else ends  # as `generate` has it
        return set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    @cached_property
    def key(self) -> str | None:
        """Equal for jobs that may share a batch; None if this one runs alone: what is seeded can be repeated."""
        if (
            self.seed is not None
            or self.needs_logits
            or self.inputs.keys() - {"input_ids", "attention_mask"}
            or not isinstance(self.model, HfDecoderForCausalLM)  # nobody knows what padding does to other classes
            or not may_be_rows(self.model, self.config)
        ):
            return None
        return repr(sorted(item for item in self.config.to_diff_dict().items() if item[0] != "max_new_tokens"))


class Rows(StoppingCriteria):
    """The rows of one `generate`, as its streamer and its criterion: hands on each token, and ends rows."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs
        self.criteria: list[StoppingCriteria] = []  # what else ends a row
        self.running = dict.fromkeys(range(len(jobs)))
        self._prompt = 0  # tokens
        self._tokens: list[list[int]] = [[] for _ in jobs]
        self._lengths: dict[int, int] = {}  # of rows that end: a token may be handed on a step later

    def put(self, value: torch.Tensor) -> None:
        """value: the prompts (B, S), then the tokens (B,) of each step.

        Raises:
            _GenerationCancelled: if all clients have left before the first step.
        """
        is_prompt = value.ndim == 2
        if is_prompt:
            self._prompt = value.shape[1]
        for row in list(self.running):
            job, tokens = self.jobs[row], self._tokens[row]
            if not is_prompt:
                tokens.append(int(value[row]))
            try:
                if job.streamer is not None:
                    job.streamer.put(value[row : row + 1])
            except _GenerationCancelled:
                self.end_row(row)
            except Exception as error:  # the other rows go on
                self.end_with(row, error)
            else:
                most = self._lengths.get(row, job.config.max_new_tokens)
                if not is_prompt and (tokens[-1] in job.ends or len(tokens) == most):
                    self.end_row(row, tokens[-1] in job.ends or row in self._lengths)
        if is_prompt and not self.running:
            raise _GenerationCancelled

    def end(self) -> None:
        """Ends the rows that something else has stopped; `generate` calls it at last."""
        for row in list(self.running):
            self.end_row(row)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        written = input_ids.shape[1] - self._prompt
        for criterion in self.criteria:
            for row, ends in enumerate(criterion(input_ids, scores).tolist()):
                if ends and row in self.running:
                    self._lengths.setdefault(row, written)
                    if len(self._tokens[row]) == written:
                        self.end_row(row, True)
        over = [row not in self.running or row in self._lengths for row in range(len(self.jobs))]
        return torch.tensor(over, device=input_ids.device)

    def end_row(self, row: int, ended: bool = False) -> None:
        self.end_with(row, Written(torch.tensor(self._tokens[row]), ended, None))

    def end_with(self, row: int, what: Written | Exception) -> None:
        del self.running[row]
        try:
            self.jobs[row].done(what)
        except Exception as error:  # such as a loop that has ended
            logger.warning(f"a request's answer could not be handed over: {error}")


class BatchingManager(GenerateManager):
    """transformers' manager of one model, which takes all jobs that fit together from those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[Job] = []
        self._lock = Lock()

    def write(self, job: Job) -> None:
        """Lets the model's thread write the job's text when its turn has come."""
        _ = job.key  # here an error is that of this request alone
        with self._lock:
            self._waiting.append(job)
        self.submit(self._run)  # one call for each job; there is nothing left for some of them

    def _run(self) -> None:
        rows = Rows(self._next())
        try:
            if len(rows.jobs) == 1:
                _write_alone(rows)
            elif rows.jobs:
                _write_together(rows)
        except _GenerationCancelled:
            pass
        except Exception as error:  # which the clients read
            for row in list(rows.running):
                rows.end_with(row, error)

    def _next(self) -> list[Job]:
        """The job that has waited longest, with those that fit beside it."""
        with self._lock:
            batch = self._waiting[:1]
            for job in self._waiting[1:]:
                if job.key is not None and job.key == batch[0].key and _fit([*batch, job]):
                    batch.append(job)
            self._waiting = [job for job in self._waiting if job not in batch]
            return batch


def _fit(jobs: list[Job]) -> bool:
    """Whether these jobs may be the rows of one batch."""
    lengths = [job.length for job in jobs]
    padding = len(jobs) * max(lengths) - sum(lengths)
    longest = max(lengths) + max(job.config.max_new_tokens for job in jobs)
    context = jobs[0].model.config.max_position_embeddings
    return (
        len(jobs) <= MAX_ROWS.get(jobs[0].model.device.type, 8)
        and padding <= max(FREE_PADDING, sum(lengths) // 2)
        and longest <= context
        and len(jobs) * longest <= MAX_CONTEXTS * context
    )


def _write_alone(rows: Rows) -> None:
    """One `generate` of one job, with all that it asks for."""
    (job,) = rows.jobs
    settings = {"generation_config": job.config, "tokenizer": job.processor, "return_dict_in_generate": True}
    if job.streamer is not None:
        settings |= {"streamer": rows, "stopping_criteria": StoppingCriteriaList([rows])}
    if job.needs_logits:
        settings["output_logits"] = True
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()), enabled=job.seed is not None):
        if job.seed is not None:
            torch.manual_seed(job.seed)  # on this thread, so that no other request draws from it
        output = job.model.generate(**job.inputs, **settings)
    if job.streamer is None:
        ids = output.sequences[0, job.length :]
        ended = len(ids) > 0 and int(ids[-1]) in job.ends
        rows.end_with(0, Written(ids, ended, torch.cat(output.logits).float() if job.needs_logits else None))


def _write_together(rows: Rows) -> None:
    """One `generate` of all rows, their prompts padded on the left."""
    jobs, first = rows.jobs, rows.jobs[0]
    ids, mask = left_padded([job.inputs["input_ids"][0].tolist() for job in jobs])
    config = copy.deepcopy(first.config)
    config.pad_token_id = PAD
    config.max_new_tokens = max(job.config.max_new_tokens for job in jobs)
    if config.stop_strings:
        rows.criteria.append(StopStringCriteria(first.processor, config.stop_strings))
        config.stop_strings = None
    first.model.generate(
        input_ids=ids.to(first.model.device),
        attention_mask=mask.to(first.model.device),
        generation_config=config,
        streamer=rows,
        stopping_criteria=StoppingCriteriaList([rows]),
    )
