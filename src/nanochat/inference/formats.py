"""How an engine may hold a model's matrices."""

import enum


class WeightFormat(enum.StrEnum):
    """FLOAT: fp32, or bfloat16 where that is faster. INT8, INT4: smaller, and faster on a CPU."""

    FLOAT = "float"
    INT8 = "int8"
    INT4 = "int4"
