"""Blocks of one class as one module with a leading layer axis: created by vmap, run by scan."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from flax import nnx

from taca_jax.attention import observing
from taca_jax.attention.keeping import ATTENTION
from taca_jax.nn.fusion import channels_together
from taca_jax.parallel.mesh import constrain_tokens
from taca_jax.parallel.rules import ShardingTable, are_gathered, gather

Remat = Literal["none", "attention+qkv+mlp", "attention+qkv", "attention", "full"]
"""What the backward pass recomputes: nothing, or each block from its inputs, but for what is kept:
its attention (output and softmax sums), the products that make queries, keys and values, and those
that the MLP begins with. `full` keeps nothing; all others keep LoRAs' inner products, which take
little room but whole inputs to compute. From the most memory to the least."""

RematChoice = Literal["auto", Remat]
"""`auto` leaves it to the memory of the devices."""

QKV_PRODUCTS, MLP_PRODUCTS, LORA_PRODUCTS = "qkv", "mlp", "lora"
"""Names of products that can be kept, as `keeping.ATTENTION` is."""
KEPT: dict[Remat, tuple[str, ...]] = {
    "attention+qkv+mlp": (ATTENTION, LORA_PRODUCTS, QKV_PRODUCTS, MLP_PRODUCTS),
    "attention+qkv": (ATTENTION, LORA_PRODUCTS, QKV_PRODUCTS),
    "attention": (ATTENTION, LORA_PRODUCTS),
    "full": (),
}
"""The names of what is kept, where blocks are recomputed."""

UNROLLED = 4
"""Stacks of at most this many blocks are unrolled unless blocks are recomputed. In a loop the
backward pass writes what it needs of every block into one large array first, which on CPUs takes
longer than a small model's products."""

Block = TypeVar("Block", bound=nnx.Module)


def make_stack(make: Callable[..., Block], layers: int, *, rngs: nnx.Rngs, **options: Any) -> Block:
    """`layers` blocks created by `make(rngs=, **options)` from different keys, their parameters
    stacked."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> Block:
        return make(rngs=rngs, **options)

    return create(rngs)


def gathered(params: nnx.State, sharding: ShardingTable, name: str) -> nnx.State:
    """The parameters of the part of a model called `name`, to run it with (`rules.gather`)."""

    def whole(path: tuple[Any, ...], variable: Any) -> Any:
        array = gather(sharding, ".".join(map(str, (name, *path))), variable.get_value())
        return variable.replace(array)

    return nnx.map_state(whole, params)


def _not_parameters(primitive: Any, *_: Any, **__: Any) -> bool:
    """A checkpoint policy that keeps everything but gathered parameters, of which each device would
    then have all: they are gathered again, and cast again."""
    return primitive.name not in ("sharding_constraint", "convert_element_type")


def _carried(tokens: jax.Array) -> jax.Array:
    return channels_together(constrain_tokens(tokens))


def run_stack(
    stack: nnx.Module,
    call: Callable[..., Any],
    carry: Any,
    *,
    each: Any = None,
    remat: Remat = "none",
    layers: slice | None = None,
    sharding: ShardingTable | None = None,
    name: str = "blocks",
) -> Any:
    """Applies `carry = call(block, carry)` for every block; traced once unless there are few.

    layers: applies these blocks only.
    each: arrays with a leading layer axis; then it is `call(block, carry, each[layer])`.
    carry: token arrays [b, s, d], whose sharding is constrained as `parallel.mesh` says.
    sharding: of the model's parameters, of which the stack is `name`: each block is gathered whole
      before it runs. Without it that is left to XLA.

    The blocks' attentions can be observed (`attention.observing`).
    """
    graph, state = nnx.split(stack)
    if layers is not None:
        state = jax.tree.map(lambda stacked: stacked[layers], state)
    depth = len(jax.tree.leaves(state)[0])

    def body(carry: Any, layer: Any) -> tuple[Any, Any]:
        params, *own = layer
        if sharding is not None:
            params = gathered(params, sharding, name)
        carry, seen = observing.layer(lambda: call(nnx.merge(graph, params), carry, *own))
        return jax.tree.map(_carried, carry), seen

    each_layer = (state,) if each is None else (state, each)
    if remat != "none":
        policy = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
    elif sharding is not None and are_gathered():
        body = jax.checkpoint(body, prevent_cse=False, policy=_not_parameters)
    unroll = max(1, depth) if depth <= UNROLLED and remat == "none" else 1
    carry = jax.tree.map(_carried, carry)
    carry, seen = jax.lax.scan(body, carry, each_layer, unroll=unroll)
    observing.record(seen)
    return carry
