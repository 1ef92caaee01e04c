"""The only tolerances of the tests. None is ever loosened for a machine or for CI.

Contributions are divided by the embedding's norm, so absolute errors of them are relative to a whole of about 1.
"""

FLOAT64 = 1e-9  # float64 rounds at 1e-16; a formula that is off by any term is off by far more than 1e-9
GOLDEN = 2e-6  # float32 against float32 of another program: both round, at 6e-8 per operation
FLOAT32 = 5e-6  # float32 against a float64 definition, through up to four layers
SUM_FLOAT32 = 1e-5  # the sum of every term of a deep tower against its embedding, both in float32
SUM_BFLOAT16 = 2e-2  # bfloat16 keeps 8 bits: 4e-3 per rounding, and the residual stream is rounded at every layer
OP_FLOAT32 = 1e-6  # one operation in float32 against float64, relative to the largest result
LOW_PRECISION_FACTOR = 2  # a backend in bfloat16 may err twice as much as the definition run in bfloat16
SDPA_FACTOR = 1.05  # attention in bfloat16 may err this much more than torch's own, both rounding weights and results
UNIT_NORM = 1e-6  # float32 normalisation: two roundings
EMBEDDING_FLOAT32 = 1e-5  # the embedding of two different float32 forwards, relative to its largest entry
EMBEDDING_BFLOAT16 = 3e-2  # the same in bfloat16, where the two forwards round at different places
JPEG = 4  # levels of 255 that the best quality of a lossy format may move a flat colour
