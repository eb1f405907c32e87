"""gflowgr: fine-tune generative recommenders as GFlowNets, with fused kernels.

The names below are loaded when first used, so ``import gflowgr`` costs next to nothing and imports
neither ``torch`` nor ``transformers`` by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .backends import backend as backend
    from .decoding import constrained_beam_search as constrained_beam_search
    from .decoding import flow_calibration as flow_calibration
    from .decoding import item_logprobs as item_logprobs
    from .decoding import sample_items as sample_items
    from .decoding.adapters import PrefixTreeLogitsProcessor as PrefixTreeLogitsProcessor
    from .decoding.adapters import constrained_generate as constrained_generate
    from .errors import DataError as DataError
    from .errors import GFlowGRError as GFlowGRError
    from .evaluation.generative import GenerativeRecommender as GenerativeRecommender
    from .models import FlowSettings as FlowSettings
    from .models import GFlowModel as GFlowModel
    from .ops import available_backends as available_backends
    from .ops import db_loss as db_loss
    from .ops import dpo_loss as dpo_loss
    from .ops import fused_db_loss as fused_db_loss
    from .ops import fused_dpo_loss as fused_dpo_loss
    from .ops import fused_flow_kl_loss as fused_flow_kl_loss
    from .ops import fused_grpo_loss as fused_grpo_loss
    from .ops import fused_subtb_loss as fused_subtb_loss
    from .ops import fused_tb_loss as fused_tb_loss
    from .ops import fused_vargrad_loss as fused_vargrad_loss
    from .ops import grpo_loss as grpo_loss
    from .ops import logprobs_from_logits as logprobs_from_logits
    from .ops import sdpo_loss as sdpo_loss
    from .ops import subtb_loss as subtb_loss
    from .ops import tb_loss as tb_loss
    from .ops import trajectory_logprobs as trajectory_logprobs
    from .ops import vargrad_log_z as vargrad_log_z
    from .ops import vargrad_loss as vargrad_loss
    from .training import GFlowGRConfig as GFlowGRConfig
    from .training import GFlowGRTrainer as GFlowGRTrainer
    from .tree import ItemFlows as ItemFlows
    from .tree import LiveTree as LiveTree
    from .tree import PrefixTree as PrefixTree
    from .tree import item_flows as item_flows

_HOME = {
    "backends": ("backend",),
    "decoding": (
        "constrained_beam_search",
        "flow_calibration",
        "item_logprobs",
        "sample_items",
    ),
    "decoding.adapters": ("PrefixTreeLogitsProcessor", "constrained_generate"),
    "evaluation.generative": ("GenerativeRecommender",),
    "errors": ("DataError", "GFlowGRError"),
    "models": ("FlowSettings", "GFlowModel"),
    "ops": (
        "available_backends",
        "db_loss",
        "dpo_loss",
        "fused_db_loss",
        "fused_dpo_loss",
        "fused_flow_kl_loss",
        "fused_grpo_loss",
        "fused_subtb_loss",
        "fused_tb_loss",
        "fused_vargrad_loss",
        "grpo_loss",
        "logprobs_from_logits",
        "sdpo_loss",
        "subtb_loss",
        "tb_loss",
        "trajectory_logprobs",
        "vargrad_log_z",
        "vargrad_loss",
    ),
    "training": ("GFlowGRConfig", "GFlowGRTrainer"),
    "tree": ("ItemFlows", "LiveTree", "PrefixTree", "item_flows"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gflowgr' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    except ModuleNotFoundError as error:
        from .errors import missing_extra

        missing = missing_extra(error)
        if missing is None:
            raise
        raise missing from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
