"""Check that a teacher can read inputs that were made for another model."""

from __future__ import annotations

from os import PathLike
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from hfslim.anatomy.adapters import base_of
from hfslim.distillation.teacher.adapted import base_source
from hfslim.distillation.teacher.teacher import split_revision
from hfslim.tasks.pairing import has_words, same_processing, settings_of

__all__ = ["check_inputs", "check_processor", "check_vocabulary"]

logger = logging.get_logger(__name__)


def check_inputs(source: Any, teacher: Any, own: Any, student: Any, student_processor: Any) -> None:
    """Refuse inputs that were made for another model.

    Processors that were not passed are looked up in the folders or Hub ids from which the models
    were loaded.

    Args:
        source: The model, Hub id or folder that was given as teacher.
        teacher: The teacher.
        own: Its own processor, if it was passed.
        student: The student.
        student_processor: The processor of the student's inputs, if it is known.

    Raises:
        ValueError: The teacher would read its inputs as something else.
    """
    reads = getattr(teacher, "main_input_name", None)
    named = isinstance(source, str | PathLike)
    place = str(source) if named else _loaded_from(teacher)
    if own is not None:
        given = list(getattr(own, "model_input_names", ()))
        if reads is not None and given and reads not in given:
            raise ValueError(
                f"teacher_processor {type(own).__name__} makes {', '.join(given)}, the teacher "
                f"{type(teacher).__name__} reads {reads!r}; pass the processor of that teacher."
            )
    processor = student_processor if own is None else own
    if processor is None and reads == "input_ids" and place and _loaded_from(student):
        named, processor = False, saved_processor(_loaded_from(student), AutoTokenizer)
    sizes = [getattr(one.config, "vocab_size", None) for one in (student, teacher)]
    if isinstance(processor, PreTrainedTokenizerBase):
        if place:
            whose = "student" if own is None else "processor"
            check_vocabulary(place, processor, whose, None if named else sizes[1])
        _check_size(processor, own, teacher, sizes)
    elif named and processor is not None:
        check_processor(place, processor)
    if reads == "input_ids" and own is None and sizes[0] != sizes[1]:
        logger.warning(
            f"Student and teacher have vocabularies of {sizes[0]} and {sizes[1]}; the teacher "
            "reads the student's token ids, so both must come from one tokenizer. For a "
            "teacher with another, pass teacher_processor."
        )


def _loaded_from(model: Any) -> str:
    """Return the Hub id or folder from which a model was loaded, or an empty string."""
    return getattr(base_of(model).config, "_name_or_path", None) or ""


def check_vocabulary(
    teacher: str, tokenizer: Any, whose: str = "student", size: int | None = None
) -> None:
    """Refuse a tokenizer that gives tokens other ids than the one that is saved with the teacher.

    Args:
        teacher: Hub id or folder; without a tokenizer there, nothing is refused.
        tokenizer: The tokenizer of the teacher's inputs.
        whose: `student`, or `processor` for the one that was passed for the teacher.
        size: Vocabulary size of a teacher that was passed as a model. It may have more tokens than
            were saved; if it has fewer, the saved tokenizer is not its own.

    Raises:
        ValueError: The two tokenizers have other ids for the same tokens.
    """
    other = saved_processor(teacher, AutoTokenizer)
    if other is None:
        return
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    differing = sorted(token for token in ours if theirs.get(token) != ours[token])
    if size is not None:
        if max(theirs.values(), default=0) >= size:
            return
        differing = [token for token in differing if token in theirs]
        if not differing:
            return
    fix = (
        "process each example for the teacher too and pass teacher_processor=<its tokenizer>, or "
        "choose a teacher with the student's tokenizer."
        if whose == "student"
        else "pass the tokenizer that is saved with the teacher."
    )
    raise ValueError(
        f"The teacher {teacher} has another vocabulary than the {whose}: {len(differing)} of "
        f"{len(ours)} tokens have other ids there, such as "
        f"{differing[:3] or sorted(set(theirs) - set(ours))[:3]}. It would read the ids as other "
        f"tokens; {fix}"
    )


def check_processor(teacher: str, processor: Any) -> None:
    """Warn if a processor of images or sounds differs from the one saved with the teacher."""
    saved = saved_processor(teacher, type(processor))
    if saved is not None and not same_processing(saved, processor):
        logger.warning(
            f"The teacher {teacher} was saved with other processing ({settings_of(saved)}) than "
            f"that of its inputs ({settings_of(processor)}); if this is not intended, process each "
            "example for the teacher too and pass teacher_processor."
        )


def saved_processor(teacher: str, kind: Any) -> Any | None:
    """Load the processor, by its class or an auto class, of a teacher or of its adapter's base."""
    own = split_revision(teacher)
    for source, revision in dict.fromkeys([own, base_source(*own)]):
        try:
            found = kind.from_pretrained(source, revision=revision)
        except (OSError, ValueError):
            continue
        if not hasattr(found, "get_vocab") or has_words(found):
            return found
    return None


def _check_size(tokenizer: Any, own: Any, teacher: Any, sizes: list[Any]) -> None:
    """Refuse a tokenizer with ids beyond the teacher's embedding."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    # Ids beyond the student's embedding, too, occur in no text.
    used = own is not None or (sizes[0] or 0) > largest
    if sizes[1] is not None and used and largest >= sizes[1]:
        what, fix = (
            ("the student's tokenizer", "pass teacher_processor=<its tokenizer>")
            if own is None
            else ("teacher_processor", "pass the tokenizer of that teacher")
        )
        raise ValueError(
            f"{what} has ids up to {largest}, the teacher {type(teacher).__name__} has a "
            f"vocabulary of {sizes[1]}; {fix}."
        )
