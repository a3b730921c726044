"""Where the arrays of a training state lie on a mesh."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from taca_jax.nn.kinds import kind_of
from taca_jax.parallel.rules import ShardingTable, parameter_spec

State = TypeVar("State")


def sharding_tables(model: nnx.Module) -> dict[tuple[str, ...], ShardingTable]:
    """The sharding tables of the models that `model` contains, by their paths in it."""
    return {
        tuple(map(str, path)): kind_of(config).sharding
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module) and (config := getattr(node, "config", None)) is not None
    }


def state_shardings(
    state: State,
    trained: nnx.State,
    tables: Mapping[tuple[str, ...], ShardingTable],
    mesh: Mesh,
) -> State:
    """The sharding of each array of a state; averages and moments are sharded as their parameters,
    and Adafactor's means of rows and columns, which are small, are whole.

    state, trained: of any arrays with shapes: all of the state, and the parameters that it trains.
    tables: of the models, by their paths in the trained model, as from `sharding_tables`.
    """

    def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
        return tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))

    flat, _ = jax.tree_util.tree_flatten_with_path(trained)
    shapes = {names_of(path): leaf.shape for path, leaf in flat}

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = names_of(path)
        if shapes.get(names, leaf.shape) != leaf.shape:
            return NamedSharding(mesh, PartitionSpec())
        for start in range(len(names)):
            for model, table in tables.items():
                inside = names[start + len(model) :]
                if inside and names[start : start + len(model)] == model:
                    spec = parameter_spec(table, ".".join(inside), leaf.shape, mesh)
                    return NamedSharding(mesh, spec)
        return NamedSharding(mesh, PartitionSpec())  # step numbers, counts and keys

    return jax.tree_util.tree_map_with_path(sharding, state)
