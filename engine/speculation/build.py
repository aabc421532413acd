"""From the configuration of speculation to who guesses and how much."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from eagleray.core.config import SpeculationConfig
from eagleray.core.errors import ConfigError
from eagleray.engine.execution.identity import compute_model_identity
from eagleray.engine.execution.sampler import TokenRule, choose_tokens
from eagleray.engine.speculation.controller import AdaptiveDrafts, DraftPolicy, FixedDrafts, NoDrafts
from eagleray.engine.speculation.decoders import DecoderNetwork
from eagleray.engine.speculation.eagle import EagleNetwork, eagle_proposer
from eagleray.engine.speculation.growth import GrowDrafts, draw_chains, grow_trees
from eagleray.engine.speculation.network import ChainGuesser, DraftNetwork, NetworkProposer
from eagleray.engine.speculation.proposer import MedusaProposer, NgramProposer, Proposer
from eagleray.engine.speculation.rejection import choose_by_rejection
from eagleray.engine.speculation.shape import draft_shape, require_fewer_layers, require_method
from eagleray.engine.speculation.tree import DraftShape
from eagleray.kernels.select import Kernels
from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.draft_config import DRAFT_GROUP, draft_groups
from eagleray.models.draft_heads.eagle import EagleHead
from eagleray.models.draft_heads.load import load_draft
from eagleray.models.draft_heads.medusa import MedusaHeads
from eagleray.models.draft_heads.read import method_of


@dataclass(frozen=True, slots=True)
class Target:
    """The model whose tokens are guessed."""

    decoder: Decoder
    dtype: str  # a key of kv_layout.DTYPE_BYTES
    kernels: Kernels


def build_proposer(config: SpeculationConfig, target: Target) -> Proposer:
    """Who guesses. Raises ``ConfigError`` for a draft that does not fit the target or the method."""
    if config.method == "ngram":
        return NgramProposer(config.prompt_lookup_min, config.prompt_lookup_max)
    if config.method == "early_exit":
        return _early_exit(config, target)
    draft = load_draft(config.folder, target.decoder, target.kernels.for_drafts())
    require_method(config, method_of(draft.config))
    if isinstance(draft, EagleHead):
        head = EagleNetwork(draft)
        return eagle_proposer(head, target.kernels, target.dtype, _growth(config), _chains(head, config, target))
    if isinstance(draft, MedusaHeads):
        return _medusa(draft, config)
    groups = draft_groups(draft.config, target.dtype)
    network = DecoderNetwork(draft, DRAFT_GROUP)
    return NetworkProposer(network, groups, _growth(config), _chains(network, config, target))


def build_token_rule(config: SpeculationConfig | None, kernels: Kernels) -> TokenRule:
    """How the tokens of a step are chosen when guesses are verified."""
    by_rejection = config is not None and config.verification == "rejection"
    return partial(choose_by_rejection if by_rejection else choose_tokens, kernels.sample_tokens)


def _growth(config: SpeculationConfig) -> GrowDrafts:
    return draw_chains if config.verification == "rejection" else grow_trees


def _chains(network: DraftNetwork, config: SpeculationConfig, target: Target) -> ChainGuesser | None:
    return None if config.verification == "rejection" else ChainGuesser.of(network, target.kernels)


def _medusa(heads: MedusaHeads, config: SpeculationConfig) -> Proposer:
    if draft_shape(config).depth > heads.config.num_heads:
        way_out = f"{config.folder} has {heads.config.num_heads} heads, each one guess ahead; set at most so many"
        raise ConfigError("speculation.num_speculative_tokens", draft_shape(config).depth, way_out)
    return MedusaProposer(heads, _growth(config))


def _early_exit(config: SpeculationConfig, target: Target) -> Proposer:
    require_fewer_layers(config, target.decoder.config.num_layers)
    group = target.decoder.layer_group(target.dtype).name
    network = DecoderNetwork(target.decoder, group, config.early_exit_layers)
    chains = _chains(network, config, target)
    return NetworkProposer(network, (), _growth(config), chains, shares_target_kv=True)


def draft_identity(config: SpeculationConfig | None) -> str:
    """Of a draft that keeps something in KV blocks; empty for others."""
    if config is None or config.model is None or config.method == "medusa":
        return ""
    return compute_model_identity(config.folder, config.revision)


def build_draft_policy(config: SpeculationConfig | None, has_network: bool) -> DraftPolicy:
    """How much is guessed at each step; nothing without a configuration."""
    if config is None:
        return NoDrafts()
    largest = draft_shape(config)
    may_defer = config.method == "draft_model"  # all others' KV is written with the target's, or they have none
    if not config.adaptive:
        return FixedDrafts(largest, has_network, may_defer)
    return AdaptiveDrafts(_smaller_shapes(largest), has_network, may_defer)


def _smaller_shapes(largest: DraftShape) -> list[DraftShape]:
    """What may be worth guessing where the whole is not: shorter chains, trees with fewer nodes."""
    if largest.paths:
        return [largest]
    if largest.is_chain:
        return [DraftShape(depth) for depth in range(1, largest.depth + 1)]
    sizes = sorted({max(1, largest.max_nodes // share) for share in (4, 2, 1)})
    chains = [DraftShape(depth) for depth in {1, largest.depth}]
    return [*chains, *(DraftShape(largest.depth, largest.branching, size) for size in sizes)]
