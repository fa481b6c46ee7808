"""Carry the user's edits of a model card over to the next card."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

__all__ = ["CARD", "MARKER", "CardError", "merge"]

CARD = "README.md"
MARKER = "<!-- What stands below this line is yours: hfslim keeps it. -->"
GENERATED = (
    "This model card has been generated automatically according to the information the Trainer",
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub",
)
"""Marks of transformers' drafts, which hold no text of the user's."""
OWN = ("library_name", "metrics", "model-index", "pipeline_tag", "tags")
OWN_TAGS = ("hfslim", "pruned", "distilled", "generated_from_trainer")


class CardError(ValueError):
    """A card cannot be written, or two versions of the user's part differ."""


def check_own(folder: Path) -> None:
    """Refuse a README.md that neither hfslim nor transformers has written.

    Raises:
        CardError: There is one.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    if MARKER not in text and _user_part(ModelCard(text, ignore_metadata_errors=True).text):
        raise CardError(
            f"{path} is not a card of hfslim: move it, or give --force, which writes the card "
            "above its text"
        )


def merge(card: str, *earlier: str) -> str:
    """Return a new card with the user's part of earlier versions.

    Args:
        card: The card that hfslim has just written.
        *earlier: Earlier versions, the most trusted first.

    Returns:
        The card with the text below the marker, and the metadata that are not hfslim's.

    Raises:
        CardError: Two versions hold different text of the user's.
    """
    new = ModelCard(card, ignore_metadata_errors=True)
    own = _user_part(new.text)
    for text in earlier:
        old = ModelCard(text, ignore_metadata_errors=True)
        other = _user_part(old.text)
        if own and other and own not in other and other not in own:
            raise CardError(
                f"two versions of {CARD} differ below the line {MARKER!r}: {own[:60]!r} here, "
                f"{other[:60]!r} there; make the two the same, or empty one"
            )
        own = max(own, other, key=len)
        theirs = [tag for tag in old.data.get("tags", []) if tag not in OWN_TAGS]
        new.data["tags"] = list(dict.fromkeys([*new.data.get("tags", []), *theirs]))
        for key, value in old.data.to_dict().items():
            if key not in OWN and new.data.get(key) is None:
                new.data[key] = value
    head, _, _ = new.text.partition(MARKER)
    new.text = f"{head}{MARKER}\n" + (f"\n{own}\n" if own else "")
    return str(new)


def _user_part(text: str) -> str:
    if MARKER in text:
        return text.partition(MARKER)[2].strip()
    return "" if any(mark in text for mark in GENERATED) else text.strip()
