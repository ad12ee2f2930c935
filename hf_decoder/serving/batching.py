"""Writes the texts of waiting requests together, one row each, if they ask for the same settings.

A step of several rows reads each weight once. A row ends by itself, and its client does not wait for the other rows.
A request that comes meanwhile joins the batch: `generate` ends, and goes on with the caches of all rows in one.
Importing this module needs the packages of the extra `serve`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.cli.serving.utils import GenerateManager, _GenerationCancelled
from transformers.utils import logging

from hf_decoder.costs.accounting import kv_bytes_per_token
from hf_decoder.engine.decoding.cpp_step import CppStep
from hf_decoder.engine.decoding.row_batches import PAD, cache_of_rows, left_padded, may_be_rows
from hf_decoder.model.modeling_hf_decoder import CACHE_NAME, HfDecoderForCausalLM

logger = logging.get_logger(__name__)

MAX_ROWS = {"cpu": CppStep.max_rows, "cuda": 32}
CACHE_BYTES = {"cpu": 2**31, "cuda": 2**33}  # the most that keys and values of a batch may take
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
    tokens: list[int] = field(default_factory=list)  # what is written, without the prompt

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[-1]

    @property
    def text_length(self) -> int:
        return self.length + len(self.tokens)

    @property
    def left(self) -> int:
        """How many tokens may follow."""
        return self.config.max_new_tokens - len(self.tokens)

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
    """The rows of one `generate`, as its streamer and its criterion: hands on each token, and ends rows.

    Between two calls of `generate` rows may come and go: `with_rows`.
    """

    def __init__(self, jobs: list[Job], cache: DynamicCache | None = None):
        """cache: of the texts so far, each but its last token."""
        self.jobs, self.cache = jobs, cache
        self.criteria: list[StoppingCriteria] = []  # what else ends a row
        self.running = dict.fromkeys(range(len(jobs)))
        self.pauses: Callable[[Rows], bool] | None = None  # whether `generate` shall end after this token
        self._paused = False
        self._start = 0  # the tokens of each row at the start of `generate`, padding included
        self._steps = 0  # the tokens of each row that this call has handed on
        self._lengths: dict[int, int] = {}  # of rows that end: a token may be handed on a step later

    def with_rows(self, others: Rows) -> Rows:
        """The running rows of both, which give up their caches."""
        jobs: list[Job] = []
        caches: list[tuple[DynamicCache, list[int]]] = []
        for of in (self, others):
            jobs += [of.jobs[row] for row in of.running]
            if of.running and of.cache is not None and of.cache.get_seq_length() == of._start + of._steps - 1:
                caches.append((of.cache, list(of.running)))
            of.cache = None
        if not jobs or sum(len(rows) for _, rows in caches) < len(jobs):
            return Rows(jobs)
        try:
            return Rows(jobs, cache_of_rows(caches, max(job.text_length for job in jobs) - 1, jobs[0].model.config))
        except RuntimeError as error:  # no memory for both: the texts are read again
            logger.warning(f"the caches of {len(jobs)} requests could not be joined: {error}")
            return Rows(jobs)

    def put(self, value: torch.Tensor) -> None:
        """value: the texts so far (B, S), then the tokens (B,) of each step.

        Raises:
            _GenerationCancelled: if all clients have left before the first step.
        """
        is_start = value.ndim == 2
        if is_start:
            self._start = value.shape[1]
        else:
            self._steps += 1
        for row in list(self.running):
            job = self.jobs[row]
            if not is_start:
                job.tokens.append(int(value[row]))
            try:
                if job.streamer is not None and not (is_start and job.tokens):
                    job.streamer.put(value[row : row + 1])
            except _GenerationCancelled:
                self.end_row(row)
            except Exception as error:  # the other rows go on
                self.end_with(row, error)
            else:
                most = self._lengths.get(row, job.config.max_new_tokens)
                if not is_start and (job.tokens[-1] in job.ends or len(job.tokens) == most):
                    self.end_row(row, job.tokens[-1] in job.ends or row in self._lengths)
        if is_start and not self.running:
            raise _GenerationCancelled

    def end(self) -> None:
        """Ends the rows that something else has stopped; `generate` calls it at last."""
        if not self._paused:
            for row in list(self.running):
                self.end_row(row)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        coming = input_ids.shape[1] - self._start - self._steps  # tokens that are not handed on yet
        for criterion in self.criteria:
            for row, ends in enumerate(criterion(input_ids, scores).tolist()):
                if ends and row in self.running:
                    self._lengths.setdefault(row, len(self.jobs[row].tokens) + coming)
                    if not coming:
                        self.end_row(row, True)
        self._paused = self._paused or (self.pauses is not None and self.pauses(self))
        over = [self._paused or row not in self.running or row in self._lengths for row in range(len(self.jobs))]
        return torch.tensor(over, device=input_ids.device)

    def end_row(self, row: int, ended: bool = False) -> None:
        self.end_with(row, Written(torch.tensor(self.jobs[row].tokens), ended, None))

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
        rows = Rows(self._take([]))
        if len(rows.jobs) == 1 and rows.jobs[0].key is None:
            _guarded(_write_alone, rows)
            return
        others = Rows([])
        try:
            while rows.running:
                _guarded(_write_together, rows, self._changes)
                running = [rows.jobs[row] for row in rows.running]
                others = Rows(self._take(running) if running else [])
                if others.jobs:
                    _guarded(_write_together, others, lambda _: True)  # their prompts and first tokens
                rows = rows.with_rows(others)
        except Exception as error:
            _end_all(rows, error)
            _end_all(others, error)

    def _changes(self, rows: Rows) -> bool:
        """Whether a job can join these rows, or so many have ended that the others are faster without them."""
        running = [rows.jobs[row] for row in rows.running]
        return bool(2 * len(running) <= len(rows.jobs) or (self._waiting and self._fitting(running)))

    def _take(self, running: list[Job]) -> list[Job]:
        with self._lock:
            fitting = self._fitting(running)
            self._waiting = [job for job in self._waiting if job not in fitting]
            return fitting

    def _fitting(self, running: list[Job]) -> list[Job]:
        """The job that has waited longest, with those that fit beside it.

        If others are `running`, those that fit beside them. Nobody overtakes a job that does not.
        """
        fitting = [] if running else self._waiting[:1]
        for job in self._waiting[len(fitting) :]:
            (first, *_) = *running, *fitting
            if job.key is not None and job.key == first.key and _fit(running, [*fitting, job]):
                fitting.append(job)
            elif running:
                break
        return fitting


def _fit(running: list[Job], jobs: list[Job]) -> bool:
    """Whether these jobs may begin together as rows of the batch that is `running`."""
    lengths = [job.length for job in jobs]
    padding = len(jobs) * max(lengths) - sum(lengths)
    rows = [*running, *jobs]
    longest = max(job.text_length for job in rows) + max(job.left for job in rows)
    model, device = rows[0].model, rows[0].model.device.type
    most = CACHE_BYTES.get(device, CACHE_BYTES["cpu"])
    return (
        len(rows) <= MAX_ROWS.get(device, 8)
        and padding <= max(FREE_PADDING, sum(lengths) // 2)
        and longest <= model.config.max_position_embeddings
        and len(rows) * longest * kv_bytes_per_token(model.config, model.dtype) <= most
    )


def _guarded(write: Callable[..., None], rows: Rows, *others: Any) -> None:
    """Writes rows; an error ends them, and their clients read it."""
    try:
        write(rows, *others)
    except _GenerationCancelled:
        pass
    except Exception as error:
        _end_all(rows, error)


def _end_all(rows: Rows, error: Exception) -> None:
    for row in list(rows.running):
        rows.end_with(row, error)


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


def _write_together(rows: Rows, pauses: Callable[[Rows], bool]) -> None:
    """One `generate` of all rows, their texts so far padded on the left, until it `pauses`."""
    jobs, first = rows.jobs, rows.jobs[0]
    ids, mask = left_padded([job.inputs["input_ids"][0].tolist() + job.tokens for job in jobs])
    config = copy.deepcopy(first.config)
    config.pad_token_id, config.use_cache = PAD, True
    config.max_new_tokens = max(job.left for job in jobs)
    if config.stop_strings:
        rows.criteria.append(StopStringCriteria(first.processor, config.stop_strings))
        config.stop_strings = None
    if rows.cache is None:
        rows.cache = DynamicCache(config=first.model.config)
    rows.pauses = pauses
    first.model.generate(
        input_ids=ids.to(first.model.device),
        attention_mask=mask.to(first.model.device),
        generation_config=config,
        streamer=rows,
        stopping_criteria=StoppingCriteriaList([rows]),
        **{CACHE_NAME: rows.cache},
    )
