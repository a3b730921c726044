"""The names that diffusers gives the parts of every MM-DiT, as rules of key tables."""

from taca_jax.formats.key_table import SWAP_HALVES, TRANSPOSE_SWAPPED, Rule, linear

_IMG = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
_TXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


def qkv(attn: str, ours: str, names: tuple[str, str, str, str, str] = _IMG) -> tuple[Rule, ...]:
    """Projections to queries, keys and values of one stream, and the norms of queries and keys."""
    q, k, v, q_norm, k_norm = names
    return (
        *linear(f"{attn}.{q}", f"{ours}.qkv.q"),
        *linear(f"{attn}.{k}", f"{ours}.qkv.k"),
        *linear(f"{attn}.{v}", f"{ours}.qkv.v"),
        Rule(f"{attn}.{q_norm}.weight", f"{ours}.qkv.q_norm.scale"),
        Rule(f"{attn}.{k_norm}.weight", f"{ours}.qkv.k_norm.scale"),
    )


def txt_qkv(block: str, ours: str) -> tuple[Rule, ...]:
    """`qkv` of a block's text stream."""
    return qkv(f"{block}.attn", f"{ours}.txt", _TXT)


def _stream(block: str, ours: str, *, mod: str, out: str, mlp: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{block}.{mod}.linear", f"{ours}.mod"),
        *linear(f"{block}.attn.{out}", f"{ours}.out"),
        *linear(f"{block}.{mlp}.net.0.proj", f"{ours}.mlp_in"),
        *linear(f"{block}.{mlp}.net.2", f"{ours}.mlp_out"),
    )


def img_stream(block: str, ours: str) -> tuple[Rule, ...]:
    """The image stream of a block."""
    return (
        *_stream(block, f"{ours}.img", mod="norm1", out="to_out.0", mlp="ff"),
        *qkv(f"{block}.attn", f"{ours}.img"),
    )


def joint_block(block: str, ours: str) -> tuple[Rule, ...]:
    """A block with an image stream and a whole text stream."""
    return (
        *img_stream(block, ours),
        *_stream(block, f"{ours}.txt", mod="norm1_context", out="to_add_out", mlp="ff_context"),
        *txt_qkv(block, ours),
    )


def embedder(theirs: str, ours: str) -> tuple[Rule, ...]:
    """An MLPEmbedder of the time, the guidance or the pooled text."""
    return tuple(
        rule
        for n in (1, 2)
        for rule in linear(f"time_text_embed.{theirs}.linear_{n}", f"{ours}.linear_{n}")
    )


def output_modulation(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """A modulation: (scale, shift) in diffusers, but (shift, scale) in the originals and here."""
    return (
        Rule(f"{theirs}.linear.weight", f"{ours}.kernel", TRANSPOSE_SWAPPED),
        Rule(f"{theirs}.linear.bias", f"{ours}.bias", SWAP_HALVES),
    )
