"""What every backend must do: the definition in float64 is the truth, whatever the backend, dtype or strides."""

from contract_attention import AttentionContract
from contract_fp8 import Fp8Contract
from contract_heads import MomentsContract, SpanContract
from contract_layers import LayersContract
from contract_linear import LinearContract
from contract_maps import MapsContract
from contract_rotate import RotateContract


class OpsContract(
    AttentionContract,
    RotateContract,
    MapsContract,
    LayersContract,
    LinearContract,
    Fp8Contract,
    MomentsContract,
    SpanContract,
):
    """Inherited by one class per backend and device, which names them."""
