"""How an engine may hold a model's matrices."""

import enum


class WeightFormat(enum.StrEnum):
    """FLOAT: fp32, or bfloat16 where that is faster. INT8, INT4: smaller, and faster on a CPU. W8A8: as INT8,
    and what the matrices are multiplied with is rounded too, which is faster still."""

    FLOAT = "float"
    INT8 = "int8"
    W8A8 = "w8a8"
    INT4 = "int4"
