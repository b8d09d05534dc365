"""The names under which PEFT knows our adapters. Imports neither torch nor peft."""

from __future__ import annotations

from typing import Any

PEFT_TYPE = "PEFT_UNLEARN_EXPERT_LORA"
SPARSE_TYPE = "PEFT_UNLEARN_SPARSE"
FORGET_VECTOR = "PEFT_UNLEARN_FORGET_VECTOR"
# What the names of an adapter's tensors begin with: transformers' delete_adapter builds it from the type's name.
PREFIX, SPARSE_PREFIX = f"{PEFT_TYPE.lower()}_", f"{SPARSE_TYPE.lower()}_"


def peft_type(name: str = PEFT_TYPE) -> Any:
    """The member of ``PeftType``, added in place if it is not there (an Enum with members cannot be subclassed)."""
    from peft.utils.peft_types import PeftType

    cls: Any = PeftType
    if name in cls.__members__:
        return cls[name]
    member = str.__new__(cls, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(cls._member_names_)
    member.__objclass__ = cls
    type.__setattr__(cls, name, member)  # before the map knows the name: EnumType refuses afterwards
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[name] = member
    if hasattr(cls, "_hashable_values_"):  # Python 3.13 looks here for `in`
        cls._hashable_values_.append(name)
    return member
