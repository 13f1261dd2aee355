"""The types of fields: bounds, kinds of paths, and the base of every section."""

from typing import Annotated

from msgspec import Meta, Struct


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section of a recipe."""


def doc(text: str) -> Meta:
    """Return the help text of a field, in Markdown."""
    return Meta(description=text)


PositiveInt = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
# Nothing would be done with 0, so it is refused rather than read as "all".
CountOrAll = Annotated[int, Meta(ge=-1, extra={"refused": 0})]
Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
UpToOne = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]

# launch/run_folder/paths.py makes fields of these types absolute.
LocalPath = Annotated[str, Meta(extra={"path": "file or folder"})]
DataPath = Annotated[str, Meta(extra={"path": "data"})]
PathOrId = Annotated[str, Meta(extra={"path": "folder or hub id"})]
FunctionName = Annotated[str, Meta(extra={"path": "file.py:function"})]
