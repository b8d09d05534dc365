"""The name under which PEFT knows the expert adapter. Imports neither torch nor peft."""

from __future__ import annotations

from typing import Any

PEFT_TYPE = "PEFT_UNLEARN_EXPERT_LORA"
# transformers' delete_adapter builds the prefix from the type's name, so it cannot be chosen freely.
PREFIX = f"{PEFT_TYPE.lower()}_"


def peft_type() -> Any:
    """The member of ``PeftType``, added in place if it is not there (an Enum with members cannot be subclassed)."""
    from peft.utils.peft_types import PeftType

    cls: Any = PeftType
    if PEFT_TYPE in cls.__members__:
        return cls[PEFT_TYPE]
    member = str.__new__(cls, PEFT_TYPE)
    member._name_ = member._value_ = PEFT_TYPE
    member._sort_order_ = len(cls._member_names_)
    member.__objclass__ = cls
    type.__setattr__(cls, PEFT_TYPE, member)  # before the map knows the name: EnumType refuses afterwards
    cls._member_names_.append(PEFT_TYPE)
    cls._member_map_[PEFT_TYPE] = member
    cls._value2member_map_[PEFT_TYPE] = member
    if hasattr(cls, "_hashable_values_"):  # Python 3.13 looks here for `in`
        cls._hashable_values_.append(PEFT_TYPE)
    return member
