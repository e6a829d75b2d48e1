"""The steps of a run, in order."""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from data import Loader
from mtx import config as configs
from mtx import decode
from mtx import metrics as reports
from mtx.checkpoint import Store
from mtx.config import Config
from mtx.errors import DataError, NumericsError, Stopped, StoppedUnsaved
from mtx.metrics import Clock, Console, Machine, Metrics
from mtx.model import Batch
from mtx.step import Program, TrainState
from mtx.train import saved
from mtx.train.stopping import Stopping
from mtx.validation import validate

log = logging.getLogger("mtx")


class Loop:
    """One run: `train` is the loop, the other methods are what it does now and then.

    Metrics are read one step late and the next batch is made by a thread, so that the device never waits for
    the host.
    """

    def __init__(
        self,
        config: Config,
        program: Program,
        loader: Loader,
        store: Store,
        stopping: Stopping,
        console: Console,
        metrics: Metrics,
        start: saved.Start,
    ):
        self.config, self.program, self.loader, self.store = config, program, loader, store
        self.stopping, self.console, self.metrics = stopping, console, metrics
        self.state, self.step, self.evaluated = start.state, start.step, start.evaluated
        self.saved = self.step
        """The step of the newest checkpoint."""
        self.samples, self.tokens = int(self.state.samples), int(self.state.tokens)
        self.arriving: tuple[int, int, int, dict[str, jax.Array]] | None = None
        self.best_val_loss = start.best_val_loss
        self.save_after_evaluation = False
        self.microbatches = configs.microbatches(config, dict(program.mesh.shape))
        self.time_T = config.batch.sequence_length
        self.clock = Clock()
        self.machine = _machine(config, program)
        self.step_fn, self.eval_fn = program.compile_train_step(), jax.jit(program.eval_sums)
        self.norm_fn = jax.jit(optax.tree.norm)

    def train(self) -> TrainState:
        """All remaining steps. Raises: Stopped after a signal; NumericsError; StorageError."""
        config, steps = self.config, self.program.steps
        if not self.evaluated:
            self.evaluate()
        if self.step >= steps:
            self.console.say(
                f"step {self.step}/{steps}: this run has come to its end before; a larger length goes on, --fresh "
                "starts anew"
            )
            return self.state
        count, started = np.int32(self.microbatches), time.perf_counter()
        with ThreadPoolExecutor(1, "batch") as ahead:
            coming = ahead.submit(self.batch)
            while self.step < steps:
                self.obey()
                with self.clock.data():
                    batch = coming.result()
                self.state, values = self.step_fn(self.state, batch, count)
                self.stopping.begun()
                self.tokens += config.batch.global_size * self.row_tokens(self.step)
                self.step, self.samples = self.step + 1, self.samples + config.batch.global_size
                last = self.step == steps
                if not last:
                    coming = ahead.submit(self.batch)
                logged = last or self.step % config.log_every == 0
                if logged or started:  # compiled with the first step
                    norm = self.norm_fn(self.state.params)
                    values |= {"param_norm": norm} if logged else {}
                self.arrived()
                self.arriving = self.step, self.samples, self.tokens, values
                if started:
                    jax.block_until_ready(values)
                    self.console.say(f"compiled and ran the first step in {time.perf_counter() - started:.1f} s")
                    self.arrived()  # before the next step begins, or its time would count here
                    started = 0.0
                self.now_and_then(last)
        return self.state

    def batch(self) -> Batch:
        """The next global batch, of which this process makes its own rows."""
        first, length = self.samples, self.row_tokens(self.step)
        shape = (self.microbatches, self.config.batch.global_size // self.microbatches, length)

        def load(numbers: np.ndarray) -> dict[str, np.ndarray]:
            try:
                return {name: rows[:, :length] for name, rows in self.loader.train(first + numbers).items()}
            except ValueError as error:
                raise DataError(str(error)) from error

        return self.program.place_rows(load, shape, self.program.batch_spec)

    def row_tokens(self, step: int) -> int:
        """Positions of the rows of the step after this one."""
        return self.time_T if (warmup := self.config.length_warmup) is None else warmup.length(step)

    def arrived(self) -> None:
        """Report the step whose metrics are on their way, if there is one."""
        if self.arriving is None:
            return
        (step, samples, tokens, on_device), self.arriving = self.arriving, None
        values = {name: value.item() for name, value in jax.device_get(on_device).items()}
        pace = self.clock.step(self.config.batch.global_size * self.row_tokens(step - 1))
        row = {"step": step, **values, "tokens": tokens, "samples": samples, **self.machine.rates(pace)}
        if (memory := reports.memory(self.program.mesh.local_devices)) is not None:
            row |= dict(zip(("memory_peak_bytes", "memory_limit_bytes"), memory, strict=True))
        self.metrics.write(step, row)
        steps, eta_s = self.program.steps, self.clock.remaining_s(self.program.steps - step)
        self.console.progress(step, loss=values["train/loss"], eta_s=eta_s)
        if step % self.config.log_every == 0 or step in (1, steps):
            row |= self.machine.rates(self.clock.since_line())
            self.console.say(reports.line(row, steps, eta_s))
        if values["skipped"] > self.config.max_skipped_steps:
            raise NumericsError(
                f"step {step}: {values['skipped']} steps were skipped because their gradients were not finite, "
                f"more than max_skipped_steps={self.config.max_skipped_steps}; nothing of them was saved. "
                "Lower the learning rate, or raise max_skipped_steps."
            )

    def now_and_then(self, last: bool) -> None:
        """Saving and evaluation, where they are due after this step: in this order, so that nothing that happens in
        an evaluation costs what was trained; its loss is added to the checkpoint then."""
        config, rule = self.config, self.store.rule
        self.evaluated = not (last or (config.eval_every and self.step % config.eval_every == 0))
        intervals = (rule.every_steps, rule.keep_every_steps) if rule else ()
        due = rule is not None and (last or any(every and self.step % every == 0 for every in intervals))
        if due or not self.evaluated:
            self.arrived()
        if due:
            self.save()
        if not self.evaluated:
            self.evaluate()

    def evaluate(self) -> None:
        """Loss on the validation split and a sample of text; a stop that was agreed on meanwhile ends it."""
        config, steps = self.config, self.program.steps
        val_loss = None
        with self.clock.excluded(), jax.set_mesh(self.program.mesh):
            if self.loader.held_out("validation"):
                values = validate(
                    config,
                    self.program,
                    self.loader,
                    self.eval_fn,
                    self.state.params,
                    between=self.obey_evaluating,
                )
                self.metrics.write(self.step, {"step": self.step, **values})
                val_loss = values["val/loss"]
                self.console.say(f"step {self.step}/{steps}  {_found(values, self.loader.corpus.gzip_bits_per_byte)}")
            if config.sample_tokens and config.model.causal:
                self.sample()
            self.evaluated = True
            self.record(val_loss)

    def record(self, val_loss: float | None) -> None:
        """What an evaluation found, in this step's checkpoint: made now if it is the best so far, or was asked for."""
        best = self.best_val_loss
        improved = val_loss is not None and (best is None or val_loss < best)
        if improved:
            self.best_val_loss = val_loss
        if (rule := self.store.rule) is None:
            return
        if self.saved == self.step and self.step > 0:
            self.store.amend(self.step, self.about(), val_loss)
        elif self.save_after_evaluation or (improved and rule.keep_best):
            self.save(val_loss)
        self.save_after_evaluation = False

    def sample(self) -> None:
        """Text of the model, for people: what goes wrong with it is said and costs nothing."""
        tokenizer = self.loader.corpus.tokenizer
        prompt = tokenizer.encode("\n") or [tokenizer.end_of_document]
        try:
            (tokens,) = decode.generate(
                self.program,
                self.state.params,
                [prompt],
                tokens=max(1, min(self.config.sample_tokens, self.time_T - len(prompt))),
                seed=self.config.seed,
                vocab_size=tokenizer.vocab_size,
            )
            text = tokenizer.decode(tokens)
        except Exception as error:
            log.warning("no sample: %s", " ".join(str(error).split())[:300])
            return
        self.metrics.text(self.step, "sample", text)
        self.console.say(f"sample:\n{text}")

    def obey_evaluating(self) -> None:
        """Between batches of an evaluation: a stop breaks it off, a save waits for its end."""
        while (request := self.stopping.tick()) is not None:
            if request.stops:
                self.save_and_stop(request.why)
            self.save_after_evaluation = self.store.rule is not None

    def obey(self) -> None:
        """What the processes agreed on, if they did: save, or save and stop."""
        while (request := self.stopping.tick()) is not None:
            self.arrived()
            if request.stops:
                self.save_and_stop(request.why)
            elif self.store.rule is not None and self.saved != self.step:
                self.save()

    def save(self, val_loss: float | None = None) -> None:
        with self.clock.excluded():
            beside = partial(self.loader.save, samples=self.samples) if self.loader.is_stream else None
            self.store.save(self.program.ordered(self.state), self.step, self.about(), val_loss, beside)
        self.saved = self.step

    def about(self) -> Mapping[str, Any]:
        return saved.about(
            self.config,
            self.program,
            self.loader,
            samples=self.samples,
            tokens=self.tokens,
            evaluated=self.evaluated,
            best_val_loss=self.best_val_loss,
        )

    def save_and_stop(self, why: str) -> None:
        at = f"stopped by {why} at step {self.step}/{self.program.steps}"
        if self.saved != self.step:
            if self.store.rule is None:
                raise StoppedUnsaved(f"{at}; checkpoints=None, so that nothing is saved.")
            self.save()
        self.store.close()
        raise Stopped(f"{at}; step {self.saved} is saved, the same command goes on.")


def _found(values: Mapping[str, float], yardstick: float | None) -> str:
    """What an evaluation found, for people: all of it, then each source."""
    text = f"val loss {values['val/loss']:.4f}  perplexity {values['val/perplexity']:.2f}"
    if (bits := values.get("val/bits_per_byte")) is not None:
        text += f"  bits per byte {bits:.4f}" + (f" (gzip -9: {yardstick:.4f})" if yardstick else "")
    sources = [name.split("/")[1] for name in values if name.count("/") == 2 and name.endswith("/loss")]
    for source in sources:
        bits = values.get(f"val/{source}/bits_per_byte")
        text += f"\n  {source}: val loss {values[f'val/{source}/loss']:.4f}"
        text += f"  bits per byte {bits:.4f}" if bits is not None else ""
    return text


def _machine(config: Config, program: Program) -> Machine:
    device = program.mesh.devices.flat[0]
    return Machine(
        devices=program.mesh.size,
        flops_per_token=reports.flops_per_token(program.model, config.batch.sequence_length),
        peak_flops=reports.peak_flops(device.device_kind, program.compute.name),
    )
