"""SelectiveTuning: the Lightning callback that puts five slots to work; the one place with side effects on a run.

setup                     refuse what would fail silently; DDP is told to leave the candidates alone
on_fit_start              find the units, own the param groups, apply the saved or the first selection
on_train_start            restore random number states (everything else is restored by now)
on_train_epoch_start      show whose `requires_grad` is whose, as at the end of an epoch
on_train_batch_start      first micro-batch of a window: probe, select, freeze
on_before_backward        tell gradients of the last micro-batch from others, for selections that they decide about
on_after_backward         last micro-batch of a window: make such a selection, average gradients over ranks
on_before_optimizer_step  first step after a switch: every selected unit must have had a gradient
on_train_batch_end        after a step: free gradients, log
on_train_end, on_exception   leave the model as found
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any
from weakref import ReferenceType, ref

from apportion import checks, clips, randomness, sync, trainers
from apportion.candidates import Candidates
from apportion.chosen_by import ChosenBy, decided
from apportion.clipping import Clipping
from apportion.entry_selection import EntrySelection
from apportion.kinds import selection_of, stage_of
from apportion.owner import Owner
from apportion.probing import TrainerProbe
from apportion.selection import History, Selection, Slots
from apportion.turns import Turns
from apportion.types import Budget, Effect, Units, When
from apportion.windows import Stage, loss_scale, run_clock
from apportion.zeroing import ZeroGrad

# Both Trainers accept a callback only if it is of their own class; where both packages are installed we are of both.
_bases: list[type] = []
if find_spec("lightning") is not None:
    from lightning.pytorch import Callback as _LightningCallback

    _bases.append(_LightningCallback)
if find_spec("pytorch_lightning") is not None:
    from pytorch_lightning import Callback as _PytorchLightningCallback

    _bases.append(_PytorchLightningCallback)
_Callback: Any = type("_Callback", tuple(_bases), {})


class SelectiveTuning(_Callback):
    """While a model is fine-tuned, trains at every step only the units that five slots select.

        mask_t = rule(score_t, budget_t);   effect: units with mask_t train, the others do not move by one bit

    A further `fit` of the same module goes on with the selection; a fit of another module starts anew.

    Args:
        units: What is scored and selected.
        score: How important each unit is.
        budget: How many units are selected.
        rule: Scores and budget to a mask.
        effect: What selection does to the training.
        select_when: Optimizer steps before which a new selection is made; every step by default.
        seed: Seed of the draws, the same on all ranks; None is 0. Draws and probes have random streams of their own.
        name: Tells several callbacks of one class on a Trainer apart, in checkpoints and logs.
        probe_data: Batches for scores that probe the loss; by default the batch of the step that is being prepared.
        probe_loss: ``probe_loss(module, batch)``, the loss to probe; by default that of ``training_step``.

    Raises:
        TypeError: If a slot is of the wrong kind.
        ValueError: If the score needs what the effect takes away.

    Example:
        >>> from apportion.budgets import Constant
        >>> from apportion.effects import Freeze
        >>> from apportion.rules import Sample
        >>> from apportion.scores import Uniform
        >>> from apportion.units import Layers
        >>> SelectiveTuning(Layers(), Uniform(), Constant(2), Sample(), Freeze(), select_when=When(every=20)).label
        'SelectiveTuning'
    """

    def __init__(
        self,
        units: Units,
        score: Any,
        budget: Budget,
        rule: Any,
        effect: Effect,
        *,
        select_when: When | None = None,
        seed: int | None = 0,
        name: str | None = None,
        probe_data: Iterable[Any] | None = None,
        probe_loss: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self.slots = Slots(units, score, budget, rule, effect, select_when or When())
        self.seed, self.name = seed or 0, name
        self.probe_data, self.probe_loss = probe_data, probe_loss
        self.selection = self.new_selection()
        self._owner: Owner | None = None
        self._probe: TrainerProbe | None = None
        self._reducer = sync.Reducer()
        self._window_open = True  # no micro-batch of the next optimizer step has run yet
        self._seen_step = -1
        self._seen_epoch = -1
        self._unchecked: set[Any] = set()  # optimizers that have not stepped since the last switch
        self._drawn = 0
        self._rng: list[dict[str, Any]] | None = None
        self._stage = Stage()
        self._clipping: Clipping | None = None
        self._zeroing: ZeroGrad | None = None
        self._turns: Turns | None = None
        self._chosen_by: ChosenBy | None = None
        self._ddp = False
        self._late = False  # the last step is counted, but what follows a step is not done
        self._met: ReferenceType[Any] | None = None  # the module that the selection is about

    def __repr__(self) -> str:
        slots = ", ".join(f"{k}={v!r}" for k, v in vars(self.slots).items())
        return f"{type(self).__name__}({slots}, seed={self.seed}, name={self.name!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to the present fit, and the ``log`` functions that Lightning puts on callbacks."""
        kept = {k: v for k, v in vars(self).items() if k not in ("log", "log_dict")}
        return {
            **kept,
            "_owner": None,
            "_probe": None,
            "_stage": Stage(),
            "_unchecked": set(),
            "_clipping": None,
            "_zeroing": None,
            "_turns": None,
            "_chosen_by": None,
            "_met": None,
        }

    @property
    def label(self) -> str:
        """Name for messages and logs."""
        return f"{type(self).__name__}" + (f"[{self.name}]" if self.name else "")

    @property
    def state_key(self) -> str:
        """Where checkpoints hold this callback's state."""
        return f"{type(self).__qualname__}{{'name': {self.name!r}}}"

    @property
    def history(self) -> History:
        """Every selection made so far on the present module, over resumes as well."""
        return self.selection.history

    def new_selection(self) -> Selection:
        """A selection with these slots that has seen nothing yet."""
        return selection_of(self.slots, self.seed, self.label)

    # Start ------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot work, before anything is built on it."""
        if stage != "fit":
            return
        if self._met is not None and self._met() is not pl_module:
            self.selection, self._drawn, self._late = self.new_selection(), 0, False
        self._seen_epoch = -1  # a fit begins an epoch; a checkpoint may say otherwise
        checks.strategy(trainer, self.label)
        checks.neighbours(trainer, self.label)
        trainers.finders(trainer, self.selection, self.probe_data is not None, SelectiveTuning)
        prepare = getattr(self.slots.units, "prepare", None)
        if prepare is not None:  # it may change the model, so it comes before the optimizers and the checkpoint
            trainer.strategy.model_to_device()
            probe = TrainerProbe(trainer, pl_module, self.probe_data, self.probe_loss, seed=self.seed)
            with probe.batches() as batches:
                prepare(pl_module, batches, probe.measure)
        self._ddp = trainers.wraps(trainer)
        if self._ddp:
            pl_module._ddp_params_and_buffers_to_ignore = sync.IgnoredNames(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Finds the units, takes over the param groups and applies the saved or the first selection."""
        self._met = ref(pl_module)
        self._owner = Owner.of(trainer.optimizers)
        self._owner.flags.hide()
        bound = checks.meet(self.selection, self._owner, pl_module)
        checks.buffers(bound, self.label)
        if self._ddp:
            sync.take_over(trainer.strategy.model, [p for p in pl_module.parameters() if p.requires_grad])
        self.slots.effect.open(self._owner, self.state_key, bound)
        if self._owner.claims[self.state_key].narrow or self._owner.displaced(self.state_key):
            self._zeroing = ZeroGrad(pl_module, self._owner.free)
        self._probe = TrainerProbe(trainer, pl_module, self.probe_data, self.probe_loss, self._drawn, self.seed)
        self._window_open, self._seen_step = True, -1
        if self._owner.displaced(self.state_key):
            clips.in_module(pl_module, self.label)
        by_gradients = "grad" in self.slots.score.needs and not pl_module.automatic_optimization
        if by_gradients and isinstance(bound, Candidates):
            checks.scaling(trainer, self.label)
            self._clipping = Clipping(trainer.precision_plugin, partial(self._decide, trainer))
            if len(self._owner.optimizers) > 1:
                self._turns = Turns(self._owner, bound, self.label)
        self._stage = stage_of(self._owner, self.state_key, self.selection)
        self._stage.begin(partial(run_clock, trainer))
        if self.selection.count:
            self._apply(trainer)
        elif self.selection.prepared >= 0:
            pass  # an interrupted run that had selected nothing yet; its optimizer's state is still to come
        elif not self.selection.needs_probe or self.probe_data is not None or self.slots.grain == "entry":
            self._select(trainer)
            self._drawn = self._probe.drawn
            by_weights = "weight" in self.slots.score.needs and self.selection.count > 0
            if by_weights and decided(self.history) and not checks.finders(trainer):
                self._chosen_by = ChosenBy(self._owner.claims[self.state_key].covered)
        if not checks.finders(trainer):  # they train now, and what they train is what is selected
            self._owner.flags.show(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Restores the random number states of an interrupted run."""
        checks.loader(trainer, self.label)
        if self._late and self._owner is not None:
            self._owner.flags.check(pl_module)
            self._conclude_step(trainer)
        self.on_train_epoch_start(trainer, pl_module)
        self._seen_step = trainer.global_step
        if self._rng is not None:
            if len(self._rng) == trainer.world_size:
                randomness.restore(self._rng[trainer.global_rank])
            else:
                warnings.warn(
                    f"`{self.label}` resumes a run of {len(self._rng)} processes on {trainer.world_size}: the "
                    "selection goes on, but dropout and shuffling draw other numbers.",
                    stacklevel=2,
                )
            self._rng = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Shows ``requires_grad`` as the user left it until the next batch, since many a user freezes here."""
        if self._owner is not None:
            self._owner.flags.show(pl_module)

    on_train_epoch_end = on_train_epoch_start

    # One step ---------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the first micro-batch of a window: updates the score, selects anew, switches."""
        if self._owner is None:
            return
        if self._ddp:
            sync.hold_back(trainer.strategy.model, fresh=self._window_open)
        if self._leads and (self._window_open or self._owner.flags.shown):
            trainers.same_optimizers(trainer, self._owner, self.label)
            self._owner.flags.check(pl_module, glance=True)
        if not self._window_open:
            return
        assert self._probe is not None
        if self._chosen_by is not None:
            self._chosen_by.check(self.label)
            self._chosen_by = None
        self._probe.current = batch
        self._select(trainer)
        self._seen_epoch = trainer.current_epoch
        self._probe.current = None
        self._drawn = self._probe.drawn
        self._window_open = False
        self._stage.arm(1 if pl_module.automatic_optimization else None, self._scale(trainer))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Tells whether the gradients of this backward pass are those of the last micro-batch."""
        self._stage.announce(final=not trainer.fit_loop._should_accumulate())

    def _scale(self, trainer: Any) -> float:
        return loss_scale(trainer) if self._stage.wants_scale() else 1.0

    def _select(self, trainer: Any) -> None:
        needs_total = getattr(self.slots.budget, "finish", 0) is None
        total = trainers.length(trainer) if needs_total else None
        fresh = trainer.current_epoch != self._seen_epoch
        if self.selection.advance(trainer.current_epoch, fresh, total, self._probe):
            self._apply(trainer)

    def _apply(self, trainer: Any) -> None:
        assert self._owner is not None
        self._owner.flags.check(trainer.lightning_module)
        self.slots.effect.apply(self._owner, self.state_key, self.selection.bound, self.selection.choice)
        self._switched(trainer)

    def _switched(self, trainer: Any) -> None:
        assert self._owner is not None
        checks.idle(trainer, self._owner, self.label)
        self._unchecked = set(trainer.optimizers)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """After the last micro-batch of a window: averages the gradients, before anything is decided by them."""
        if self._owner is None or (pl_module.automatic_optimization and trainer.fit_loop._should_accumulate()):
            return
        if pl_module.automatic_optimization:
            self._settle(trainer)
        if trainer.world_size > 1 and self._leads:
            self._reducer.reduce([p for p in self._owner.training() if p not in self._owner.averaged])
        if pl_module.automatic_optimization:
            self._stage.finish(self._scale(trainer))

    def _settle(self, trainer: Any) -> None:
        if self._stage.settle():
            self._switched(trainer)
            if self._turns is not None:
                self._turns.settled()

    def _decide(self, trainer: Any) -> None:
        """Under manual optimization, what has to be done once all gradients of the step are there."""
        self._settle(trainer)
        self._stage.finish(1.0)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """At the first step after a switch: the selected units must have had gradients."""
        # Under automatic optimization it has been settled, unless the last micro-batch had no loss.
        self._settle(trainer)
        if self._turns is not None:
            self._turns.stepped(optimizer)
        if not pl_module.automatic_optimization:
            self._stage.finish(1.0)
        if optimizer not in self._unchecked or self._owner is None or checks.skipped(optimizer):
            return
        self._unchecked.discard(optimizer)
        if isinstance(self.selection, EntrySelection):
            without = checks.entry_gradients(self._owner, optimizer, self.selection.bound, self.label)
        else:
            assert self.selection.mask is not None
            bound, mask = self.selection.bound, self.selection.mask
            without = list(checks.gradients(self._owner, optimizer, bound, mask, self.label))
        if without and self.selection.count == 1:
            warnings.warn(
                f"`{self.label}` trains units of which some parameters got no gradient, such as "
                f"{', '.join(without[:3])}: the loss does not depend on them (an expert that saw no token, say).",
                stacklevel=2,
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step: frees the gradients, counts the step, logs what is selected."""
        if self._owner is None or trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        self.selection.step += 1
        self._window_open = True
        self._conclude_step(trainer)
        if self._trails and pl_module.automatic_optimization:  # Lightning would keep them through the next forward pass
            for p in self._owner.training():
                p.grad = None
        self._stage.end()
        logged = {**self.selection.metrics(), **self._stage.metrics()}
        pl_module.log_dict({f"{self.label}/{k}": v for k, v in logged.items()})

    def _conclude_step(self, trainer: Any) -> None:
        self._late = False
        if self._stage.after_step(partial(run_clock, trainer)):
            self._switched(trainer)

    @property
    def _leads(self) -> bool:
        """Whether this callback does what is to be done once for all selections on the run."""
        return self._owner is not None and next(iter(self._owner.claims), None) == self.state_key

    @property
    def _trails(self) -> bool:
        """Whether all other selections on the run have had their turn before this one."""
        return self._owner is not None and next(reversed(self._owner.claims), None) == self.state_key

    # End --------------------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leaves the model and the optimizers as they were found, once what a schedule has promised is done."""
        self._stage.conclude(partial(run_clock, trainer))
        self._release(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leaves the model and the optimizers as they were found; a checkpoint can still be written."""
        if self._stepped(trainer):
            self.selection.step += 1
            self._seen_step, self._late = trainer.global_step, True
        self._release(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leaves the model as it was found if the fit never started."""
        if stage == "fit":
            self._release(pl_module)

    def _release(self, pl_module: Any) -> None:
        pl_module.__dict__.pop("_ddp_params_and_buffers_to_ignore", None)
        for stands in (self._clipping, self._zeroing, self._turns):
            if stands is not None:
                stands.detach()
        owner = self._owner
        self._owner = self._probe = self._rng = self._clipping = self._zeroing = None
        self._turns = self._chosen_by = None
        self._stage = Stage()
        self._unchecked = set()
        if owner is not None:
            with owner.flags.kept():
                self.slots.effect.close(owner, self.state_key)

    def _stepped(self, trainer: Any) -> bool:
        """Whether an optimizer step of this batch is taken that is not counted yet."""
        return self._owner is not None and -1 < self._seen_step < trainer.global_step

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The selection, its scores, draws and history, as plain data and CPU tensors."""
        selection = {**self.selection.state_dict(), **self.selection.origin()}
        return {"selection": selection, "drawn": self._drawn, "epoch": self._seen_epoch, "late": self._late}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a saved selection, also in the middle of a fit (the learning-rate finder does that)."""
        self._stage.disarm()
        if self._owner is None:
            self._met = None  # what is loaded is for the module that comes
        else:
            self._owner.flags.hide()
        self.selection.load_state_dict(state_dict["selection"])
        self._drawn, self._seen_epoch = int(state_dict["drawn"]), int(state_dict["epoch"])
        self._late = bool(state_dict.get("late"))  # files of earlier versions do not tell
        if self._owner is not None and self.selection.choice is not None:
            self.slots.effect.apply(self._owner, self.state_key, self.selection.bound, self.selection.choice)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds every rank's random number states; called on all ranks, as Lightning saves."""
        saved = checkpoint["callbacks"][self.state_key]
        saved["rng"] = sync.gather(randomness.capture())
        if self._stepped(trainer):  # by a callback that stands before this one, or in mid-batch
            saved["selection"]["step"] += 1
            saved["late"] = True

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps the saved random number states until the training starts."""
        self._rng = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("rng")
