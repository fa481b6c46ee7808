"""Pushes of a Trainer to the Hub: complete commits, with a model card and a report."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sized
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from hfslim.anatomy.structure import Structure
from hfslim.anatomy.weights import zeros_of
from hfslim.hub.card import write_card
from hfslim.hub.push import LEFT_OUT, PushError, hub_errors_explained, push
from hfslim.reporting.provenance import Machine, Origin, Provenance
from hfslim.reporting.report import REPORT, Quality, Report

__all__ = ["HubMixin"]

logger = logging.get_logger(__name__)

Names = str | list[str] | None
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time")


class HubMixin(Trainer):
    """Makes each push of a Trainer one commit from which the model loads.

    Put it before the Trainer class. `create_model_card` writes hfslim's card and `report.json`;
    `push_to_hub` pushes them with the model. Pushes during training (`hub_strategy` `every_save`,
    `checkpoint`, `all_checkpoints`) are made from a copy of the checkpoint, with the key names of
    the Hub's files; where one fails, training goes on with a warning. Pickles such as
    `training_args.bin` are pushed only inside checkpoints.

    Raises:
        PushError: The Hub refuses the token, the repository or the push.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, as `transformers.Trainer.init_hf_repo`."""
        token = token or self.args.hub_token
        with hub_errors_explained(repr(self.args.hub_model_id or self.args.output_dir), token):
            super().init_hf_repo(token=token, private=private)

    def create_model_card(
        self,
        language: Names = None,
        license: str | None = None,
        tags: Names = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Names = None,
        dataset_tags: Names = None,
        dataset: Names = None,
        dataset_args: Names = None,
    ) -> None:
        """Write hfslim's card and `report.json` into the output folder.

        A `report.json` there that holds measurements stays as it is.

        Args:
            language: For the card's metadata; so are `license` and `tags`.
            license: See `language`.
            tags: See `language`.
            model_name: Not used: the card is named after the repository.
            finetuned_from: Hub id of the base model; by default the source of the model.
            tasks: transformers' name of the task; by default that of the model's class.
            dataset_tags: Hub ids of the data sets.
            dataset: Name of the data, where it is not on the Hub.
            dataset_args: Configuration of the data set.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        model = self._unwrapped()
        if not (folder / "config.json").exists():
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
        names = _listed(dataset_tags)
        report = self._report(finetuned_from, _listed(tasks))
        data = names or _listed(dataset)
        if data:
            config = next(iter(_listed(dataset_args)), None)
            origin = Origin(", ".join(data), on_hub=len(names) == 1, config=config)
            report = replace(report, provenance=replace(report.provenance, data=origin))
        if not _measured(folder):
            report.write(folder)
        metadata = {"language": language, "license": license, "tags": _listed(tags)}
        write_card(
            folder,
            name=self.hub_model_id,
            metadata={key: value for key, value in metadata.items() if value},
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and push the output folder, in one commit.

        Args:
            commit_message: First line of the commit.
            blocking: Whether to wait for the push.
            token: The Hub's; by default `args.hub_token`.
            revision: Branch; by default `args.hub_revision`.
            private: Whether a new repository is private; by default `args.hub_private_repo`.
            **kwargs: As for `create_model_card`.

        Returns:
            The commit, or its future if `blocking` is False; None on other than the first process.

        Raises:
            PushError: Nothing was pushed; the output folder is complete.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        token = token or args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        own = getattr(self._unwrapped(), "model_tags", None) or []
        kwargs["tags"] = list(dict.fromkeys([*_listed(kwargs.get("tags")), *own]))
        self.create_model_card(**kwargs)
        job = partial(
            push,
            str(args.output_dir),
            str(self.hub_model_id),
            token=token,
            revision=revision or args.hub_revision,
            commit_message=commit_message or "End of training",
        )
        return job() if blocking else hf_api().run_as_future(job)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args, checkpoint, output = self.args, Path(checkpoint_folder), str(self.args.output_dir)
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not args.hub_always_push:
            return
        weights = [load_file(path) for path in sorted(checkpoint.glob("model*.safetensors"))]
        if not weights or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        staged = Path(tempfile.mkdtemp(prefix="_push-", dir=output))
        names = shutil.ignore_patterns(*LEFT_OUT, "*.safetensors", "*.safetensors.index.json")
        shutil.copytree(output, staged, dirs_exist_ok=True, ignore=names)
        self._unwrapped().save_pretrained(
            staged,
            state_dict={name: tensor for part in weights for name, tensor in part.items()},
            save_original_format=True,
        )
        if self.processing_class is not None:
            self.processing_class.save_pretrained(staged)
        if not _measured(staged):
            self._report(None, []).write(staged)
        step = f"epoch {int(self.state.epoch or 0)}"
        if args.save_strategy == SaveStrategy.STEPS:
            step = f"step {self.state.global_step}"
        also = {}
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            also["last-checkpoint" if last else checkpoint.name] = staged / "_checkpoint"
            shutil.copytree(checkpoint, staged / "_checkpoint")
        job: Future[Any] = hf_api().run_as_future(
            _push_staged,
            staged,
            str(self.hub_model_id),
            token=args.hub_token,
            revision=args.hub_revision,
            commit_message=f"Training in progress, {step}",
            also=also,
        )
        if running and self.push_in_progress is not None:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type, assignment]

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _report(self, finetuned_from: str | None, tasks: list[str]) -> Report:
        """Return a report of origins, losses, evaluation, and pruning by a callback."""
        args: Any = self.args
        model, teacher = self._unwrapped(), getattr(self, "teacher", None)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        base = Origin(finetuned_from, on_hub=True) if finetuned_from else None
        structure: list[dict[str, Any]] = []
        stages: list[dict[str, dict[str, Any]]] = []
        for callback in self.callback_handler.callbacks:
            kept = getattr(callback, "structure", None)
            if isinstance(kept, Structure) and isinstance(callback, ExportableState):
                given = callback.state()["args"].items()
                stages.append({"prune": {k: v for k, v in given if v is not None}})
                # During training the units are only gated, and no weight is removed.
                structure = [] if kept.is_full or self.is_in_train else kept.table()
        settings = ("learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type")
        used = {name: getattr(args, name) for name in settings}
        used |= {"batch_size": args.train_batch_size * args.gradient_accumulation_steps}
        stages.append({"train": {name: getattr(v, "value", v) for name, v in used.items()}})
        taught = None
        if teacher is not None:
            passed = Origin(f"a {type(teacher).__name__} that was passed as a model")
            taught = _origin(teacher) or passed
        return Report(
            model=str(self.hub_model_id or Path(args.output_dir).name),
            quality=self._quality(),
            structure=structure,
            stages=stages,
            weight_sparsity=[] if sharded else zeros_of(model),
            provenance=Provenance(
                task=tasks[0] if tasks else None,
                base=base or _origin(model),
                teacher=taught,
                losses={"train": getattr(args, "objective", "loss_hard")},
                seeds=(args.seed,),
                processes=args.world_size,
                machine=Machine.here(),
            ),
        )

    def _quality(self) -> list[Quality]:
        evaluated = [entry for entry in self.state.log_history if "eval_loss" in entry]
        if not evaluated:
            return []
        data = self.eval_dataset
        count = len(data) if isinstance(data, Sized) else None
        metrics = {
            key.removeprefix("eval_"): float(value)
            for key, value in evaluated[-1].items()
            if key.startswith("eval_") and isinstance(value, int | float)
        }
        names = [name for name in metrics if name not in _SPEED and name != "loss"] or ["loss"]
        seeds = (self.args.seed,)
        return [Quality(n, metrics[n], None, "evaluation", count, seeds) for n in names]


def _push_staged(folder: Path, repo_id: str, **how: Any) -> None:
    """Push a copy of a checkpoint and remove it; an error must not stop the training."""
    try:
        push(folder, repo_id, **how)
    except PushError as error:
        logger.warning(f"a push during training failed, the next one holds all of it: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _origin(model: Any) -> Origin | None:
    source = getattr(model.config, "_name_or_path", None)
    return Origin.of_model(source) if source else None


def _measured(folder: Path) -> bool:
    return (folder / REPORT).exists() and bool(Report.load(folder).comparisons)


def _listed(value: Names) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
