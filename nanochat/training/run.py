"""The state of a training run: what a stage's loop works with at every step, and what a checkpoint stores.

Not here: the loops (in the scripts), and what one optimizer step does (`loop.py`).
"""

import gc
import math
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from nanochat.checkpoint import load_rank_states, step_dir
from nanochat.common import Runtime, print0
from nanochat.data.dataloader import Batch
from nanochat.evals.loss_eval import BpbResult
from nanochat.model.gpt import GPT
from nanochat.records import append_record
from nanochat.tokenizer import Tokenizer
from nanochat.training import schedule
from nanochat.training.interrupts import Agreement, StopSignals, write_batches
from nanochat.training.loop import LossScaler, accumulate_gradients, apply_schedule, is_due, squared_gradients
from nanochat.training.metrics import MetricsLog, RunStats, StepLog, peak_memory_bytes
from nanochat.training.optim import MuonAdamW
from nanochat.training.progress import Progress, Status
from nanochat.training.recipe import Plan
from nanochat.training.saving import Saver


@dataclass
class TrainingRun:
    """The state of a training run: what a stage's loop works with at every step, and what a checkpoint stores.

    A step is `num_micro_steps` batches of `loader`, each of `device_batch_size` rows, on every rank. `args` are the
    stage's flags, among them `run`, `save_every` and those of the learning rate. Model and tokenizer are already loaded
    by the caller; all other state is restored from the checkpoint of which `resumed` is the meta.json, empty for a new
    run. `results` are the numbers for the report.
    """

    folder: Path
    args: Namespace
    runtime: Runtime
    model: GPT
    tokenizer: Tokenizer
    optimizer: MuonAdamW
    loader: Iterator[Batch]
    plan: Plan
    device_batch_size: int
    num_micro_steps: int
    resumed: Mapping
    results: dict = field(default_factory=dict)
    first_step: int = 0
    examples: Sequence[str] = ()  # questions that the model learns to answer, for the chat page
    shards: dict | None = None  # the note of `run_shards`, for the checkpoints; None where there are no shards

    def __post_init__(self):
        args, plan, runtime = self.args, self.plan, self.runtime
        for group in self.optimizer.groups:
            group.initial_lr *= plan.lr_scale
            if group.kind == "muon":
                group.initial_weight_decay = plan.matrix_weight_decay
        self.optimizer.zero_grad()  # fitting the batch to the memory has removed the gradients' storage
        shape = {"warmup_steps": args.warmup_steps, "warmdown_frac": args.warmdown_frac}
        self.rates = schedule.LRSchedule(plan.num_steps, **shape, final_frac=args.final_lr_frac)
        self.scaler = LossScaler(enabled=runtime.dtype == torch.float16)
        self.stats = RunStats.for_runtime(runtime, plan.total_batch_tokens, self.model.flops_per_token())
        self.metrics = MetricsLog(
            self.folder / "metrics.jsonl", runtime, run_name=args.run, settings=vars(args),
            wandb_id=self.resumed.get("wandb_id"),
        )  # fmt: skip
        self.agreement = Agreement(runtime)
        self.saver = Saver(
            self.folder, runtime, keep_last=args.keep_last, keep_every=args.keep_every, group=self.agreement.group
        )
        if self.resumed:
            self._restore(step_dir(self.folder, self.resumed["step"]), self.resumed)
        self._check_disk()
        self.metrics.rewind(self.first_step)
        self.progress = Progress(runtime, plan.num_steps)
        self.log = StepLog(self.stats, self.metrics, self.progress, self.examine)
        self.log.val_bpb = self.results.get("val_bpb")
        self.status = Status(self.folder, runtime, plan.num_steps)
        self.stop_signals = StopSignals(is_main=runtime.is_main)

    def _restore(self, folder: Path, meta: Mapping) -> None:
        self.optimizer.load_state_dict(load_rank_states(folder, meta, "optimizer"))
        self.loader.load_state_dict(load_rank_states(folder, meta, "loader"))
        self.first_step, self.results = meta["step"], meta["results"]
        self.saver.last_saved = self.first_step
        self.scaler.restore(meta["scaler"])
        self.stats.restore(meta["stats"])
        print0(f"resumed at step {self.first_step:,}")

    def steps(self) -> Iterator[int]:
        """The step numbers of the loop, up to and including the one after the last optimizer step. Meanwhile signals
        stop the run at a step, in `save_if_due`."""
        gc.collect()
        gc.freeze()  # exempts what lives until the end from collections, which paused training for 0.5 s
        self.stop_signals.listen()
        try:
            yield from range(self.first_step, self.plan.num_steps + 1)
        finally:
            self.stop_signals.close()
            gc.unfreeze()

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done `every` steps is due; at the step of a resumed checkpoint it has been done already.
        If due, waits for the step in flight, so that its time does not include what comes next."""
        is_new = step > self.first_step or not self.resumed
        due = is_new and is_due(step, every, self.plan.num_steps)
        if due:
            self.log.flush()
        return due

    def note(self, step: int, **numbers: float) -> None:
        """Log `numbers` found by an evaluation at `step`, and keep them for the report."""
        self.results = {**self.results, **numbers}
        self.metrics.log(step=step, **numbers)

    def note_bpb(self, step: int, found: BpbResult) -> None:
        """Log and print the validation loss at `step`; keep it and the lowest so far for the report."""
        bpb, se = found.bpb, found.se
        self.metrics.log(step=step, val_bpb=bpb, val_bpb_se=se, tokens=step * self.plan.total_batch_tokens)
        self.log.val_bpb = bpb
        lowest = min(bpb, self.results.get("min_val_bpb", math.inf))
        self.results = {**self.results, "val_bpb": bpb, "val_bpb_se": se, "min_val_bpb": lowest}
        print0(f"step {step:>5} | validation {bpb:.4f} +- {se:.4f} bits per byte")

    def save_if_due(self, step: int) -> None:
        """Save every `--save-every` steps and `--save-minutes`, and at the last step. After a signal on any rank, save
        and end the run, unless it is at its end."""
        minutes = self.args.save_minutes
        is_time = minutes and self.runtime.is_main and time.monotonic() > self.saver.started + 60 * minutes
        stop, is_time, is_writing = self.agreement.largest(self.stop_signals.number, is_time, self.saver.is_writing)
        if not is_writing:
            self.saver.finish()
        self._tell("training", step)
        is_due = self.is_due(step, self._save_every)
        if is_due or ((stop or is_time) and step > self.first_step):
            self.log.flush()
            self.save(step)
        if step == self.plan.num_steps:
            self.saver.finish()
        elif stop:
            self._stop(step, stop)

    def _tell(self, state: str, step: int, *, is_news: bool = False) -> None:
        """Write what there is to know from outside to status.json, if it is time or `is_news`."""
        stats, saved = self.stats, self.saver.last_saved
        self.status.write(
            state, is_news=is_news, step=step, tokens_per_second=stats.tokens_per_second, mfu=stats.mfu,
            seconds_left=stats.seconds_left(self.plan.num_steps - step),
            last_checkpoint=None if saved is None else step_dir(self.folder, saved).name,
        )  # fmt: skip

    @property
    def _save_every(self) -> int:
        return self.args.save_every or self.plan.num_steps

    def _check_disk(self) -> None:
        states = [self.optimizer.state_dict(), self.model.state_dict() if self.runtime.is_main else {}]
        num_bytes = sum(tensor.nbytes for state in states for tensor in state.values())
        last = self.plan.num_steps
        multiples = range(self.first_step - self.first_step % self._save_every, last, self._save_every)
        self.saver.check_disk(num_bytes, [step for step in (*multiples, last) if step > self.first_step])

    def _stop(self, step: int, number: int) -> None:
        """End the process with the exit status of signal `number`."""
        self.saver.finish()
        self.progress.close()
        self.metrics.finish()
        self._tell("stopped", step, is_news=True)
        how = "the same command with --resume goes on from here" if step else "before its first step"
        print0(f"stopped by {signal.Signals(number).name} at step {step:,}: {how}")
        raise SystemExit(128 + number)

    def save(self, step: int) -> None:
        """Begin to write a checkpoint of everything the run needs to continue."""
        meta = {
            "args": vars(self.args), "plan": asdict(self.plan), "dtype": self.runtime.dtype_name,
            "results": self.results, "device_batch_size": self.device_batch_size, "stats": self.stats.state(),
            "scaler": self.scaler.state(), "wandb_id": self.metrics.wandb_id, "shards": self.shards,
        }  # fmt: skip
        if self.examples:
            meta["examples"] = list(self.examples)
        self.saver.start(
            step, model=self.model, tokenizer=self.tokenizer, meta=meta,
            optimizer_state=self.optimizer.state_dict(), loader_state=self.loader.state_dict(),
        )  # fmt: skip

    def take_step(self, step: int) -> None:
        """One optimizer step on the next batches of the loader, timed and logged."""
        self.log.start()
        batches = list(islice(self.loader, self.num_micro_steps))
        self.log.end(step + 1, self.update(step, batches), batches, lr_mult=self.rates(step))

    def update(self, step: int, batches: Sequence[Batch]) -> Tensor:
        """One optimizer step on `batches`. Returns its loss and the sum of the squared gradients, (2,) float32 on the
        device, for `examine`. With `--skip-bad-steps`, a step where one of these is not finite changes nothing: the
        host then waits for the numbers before the update, where otherwise they are read one step later."""
        apply_schedule(
            self.optimizer, lr_mult=self.rates(step), momentum=schedule.muon_momentum(step, self.rates),
            decay_mult=schedule.decay_mult(step, self.plan.num_steps),
        )  # fmt: skip
        can_skip = self.args.skip_bad_steps > 0
        loss_t = accumulate_gradients(
            self.model, iter(batches), len(batches), device=self.runtime.device,
            world_size=self.runtime.world_size, loss_scale=self.scaler.scale,
            before_last=None if self.scaler.enabled or can_skip else self.optimizer.expect_last_backward,
        )  # fmt: skip
        found = torch.stack((loss_t, squared_gradients(self.optimizer)))
        is_good = self.scaler.unscale_(self.optimizer)
        if can_skip and not self.scaler.enabled:
            is_good = bool(torch.isfinite(found).all())
        if is_good:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return found

    def examine(self, step: int, loss: float, squares: float, batches: Sequence[Batch]) -> None:
        """Unless the numbers of step `step`, counted from 1, are finite: write down the documents of its batches, and
        end the run with exit status 1 if more than `--skip-bad-steps` have been skipped. In float16 such steps are no
        news, and have been skipped already. Every rank calls this with the same numbers."""
        if self.scaler.enabled or (math.isfinite(loss) and math.isfinite(squares)):
            return
        folder = self.folder / "bad_steps"
        write_batches(folder / f"step_{step:06d}_rank{self.runtime.rank}.jsonl", batches, self.tokenizer)
        fault = f"the loss at step {step} is {loss}"
        if math.isfinite(loss):
            fault = f"the gradient at step {step} is not finite"
        fault += f" (documents of its batch: {folder})"
        self.stats.num_skipped += 1
        if self.stats.num_skipped <= self.args.skip_bad_steps:
            print0(f"{fault}: left out, {self.stats.num_skipped} of at most {self.args.skip_bad_steps}")
            return
        self.saver.finish()
        self.progress.close()
        self.metrics.finish()
        self._tell("failed", step, is_news=True)
        remedy = "go on with --resume and a higher --skip-bad-steps, or start anew with a lower --lr-mult"
        print0(f"error: {fault}; {remedy}", file=sys.stderr)
        raise SystemExit(1)

    def finish(self, stage: str, **own: float | None) -> None:
        """Close the metrics and add the stage's record to the report; `own` results replace the usual ones."""
        self.progress.close()
        self.metrics.finish()
        self._tell("done", self.plan.num_steps, is_news=True)
        plan, stats, runtime = self.plan, self.stats, self.runtime
        results = self.results | {
            "train_loss": stats.smooth_loss, "num_parameters": self.model.parameter_counts()["total"],
            "num_steps": plan.num_steps, "train_tokens": plan.train_tokens,
            "train_flops": plan.train_tokens * self.model.flops_per_token(),
            "tokens_per_second": stats.tokens_per_second, "mfu": stats.mfu, "train_seconds": stats.seconds,
            "peak_memory_bytes": peak_memory_bytes(runtime), **own,
        }  # fmt: skip
        samples = results.pop("samples", None)
        if runtime.is_main:
            settings = {**vars(self.args), **asdict(plan), "dtype": runtime.dtype_name}
            settings["config"] = asdict(self.model.config)
            append_record(stage, settings=settings, results=results, samples=samples, metrics_path=self.metrics.path)
        print0(f"done: {self.folder.name}, {plan.num_steps:,} steps in {stats.seconds / 60:.1f} minutes of training")
