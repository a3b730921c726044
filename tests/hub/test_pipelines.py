"""Hub ids where paths stand: pipelines, LoRAs, autoencoders, tokenizers, conversion, plans."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from taca_jax.autoencoders.tiny_vae_layout import open_taesd
from taca_jax.config.json_text import to_tree
from taca_jax.convert.cli import main
from taca_jax.data.config import DataConfig
from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import write_tensors
from taca_jax.hub.ids import HubId
from taca_jax.nn.lora import LoRAConfig
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.loras import check_lora
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.pipelines.previews import open_previewer
from taca_jax.text.tokenizers import FolderTokenizer
from taca_jax.training.config import TrainConfig
from taca_jax.training.models import open_models
from taca_jax.weights.hub_files import lora_files, model_files, pipeline_files, tokenizer_folders
from taca_jax.weights.lora_files import load_adapter
from taca_jax.weights.pipeline_folders import open_autoencoder, open_pipeline
from taca_jax.weights.shipped import find_weights, is_here
from tests.pipelines.test_originals import assert_same_pipeline
from tests.shared import shared_path
from tests.weights.diffusers_folders import write_tokenizers
from tests.weights.small_flux import write_diffusers, write_files

DUPLICATES = (
    "README.md",
    "flux1-dev.safetensors",
    "ae.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "transformer/flax_model.msgpack",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.onnx",
    "text_encoder_2/tf_model.h5",
    "safety_checker/model.safetensors",
)
REPO = "black-forest-labs/FLUX.1-dev"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_diffusers(tmp_path_factory.mktemp("diffusers") / "flux")


@pytest.fixture
def flux(hub, folder):
    """A hub with a pipeline, and with the files beside it that published ones have."""
    hub.add_folder(REPO, folder)
    hub.repos[REPO].revisions["main"] |= dict.fromkeys(DUPLICATES, b"not to be fetched")
    return hub


def files_in(folder: Path) -> set[str]:
    return {each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()}


def test_a_pipeline_is_fetched_without_its_duplicates_and_is_found_offline(flux, folder, offline):
    ours = Pipeline.from_pretrained(REPO, "float32")
    assert files_in(open_pipeline(REPO).where) == files_in(folder)
    assert flux.fetched <= files_in(folder)  # the two tokenizers are one blob
    assert_same_pipeline(ours, Pipeline.from_pretrained(folder, "float32"))
    offline()
    asked = len(flux.asked)
    assert open_pipeline(f"{REPO}@main").models.keys() == open_pipeline(REPO).models.keys()
    with pytest.raises(UserError, match=r"the cache lacks 1 files of .*: ae\.safetensors; HF_HUB"):
        find_weights(f"{REPO}:ae.safetensors", model_files)
    assert len(flux.asked) == asked


def test_a_path_and_a_shipped_name_come_first(flux, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_weights("shapes_base").is_dir()
    (tmp_path / "black-forest-labs").mkdir()
    with pytest.raises(UserError, match=rf"is not there; give base= .* write {REPO}@main"):
        open_pipeline(REPO)
    (tmp_path / REPO).symlink_to(folder)
    assert open_pipeline(REPO).where == Path(REPO)
    assert flux.asked == []


def test_mistyped_paths_keep_their_messages(hub):
    with pytest.raises(UserError, match="runs/foo/model is not there; give base= a folder that"):
        open_pipeline("runs/foo/model")
    with pytest.raises(
        UserError, match=r"flux1-dev is not there; .* on the hub it is base=black-fo"
    ):
        open_pipeline("flux1-dev")
    lora = GenerateConfig("shapes_base", lora="runs/flux_taca/lora.safetensors")
    with pytest.raises(UserError, match=r"lora=runs/.* is not there; train it, .* owner/repo"):
        check_lora(lora)
    assert hub.asked == []


def test_a_single_file_brings_what_lies_beside_it(hub, tmp_path):
    root = write_files(
        tmp_path / "x", {"transformer": "flux1-dev.safetensors", "vae": "ae.safetensors"}
    )
    write_tokenizers(root)
    hub.add_folder("some/flux", root)
    hub.repos["some/flux"].revisions["main"]["other.safetensors"] = b""
    stored = open_pipeline("some/flux:flux1-dev.safetensors")
    assert stored.models.keys() == {"transformer", "autoencoder"}
    assert (stored.tokenizers / "tokenizer_2" / "tokenizer.json").is_file()
    assert "other.safetensors" not in hub.fetched


def test_loras(hub):
    content = shared_path("golden/flux/lora/pytorch_lora_weights.safetensors").read_bytes()
    hub.add("one/lora", {"it.safetensors": content, "config.json": b"{}", "x.png": b""})
    hub.add("many/loras", {"a.safetensors": content, "b.safetensors": b"", "c/d.safetensors": b""})
    found = find_weights("one/lora", lora_files)
    assert (found.name, found.read_bytes()) == ("it.safetensors", content)
    assert hub.fetched == {"it.safetensors"}
    assert find_weights("many/loras@main:a.safetensors", lora_files).read_bytes() == content
    said = (
        r"many/loras has several weights \(a\.safetensors, b\.safetensors\); name one: many/loras:"
    )
    with pytest.raises(UserError, match=said):
        find_weights("many/loras", lora_files)
    with pytest.raises(UserError, match=r"many/loras has no e\.st; it has a\.saf.*, b.*, c/"):
        find_weights("many/loras:e.st", lora_files)


def test_a_lora_of_peft_has_its_alpha(hub):
    layer = "base_model.model.transformer_blocks.0.attn.to_q"
    factors = {"A": np.ones((8, 32), np.float32), "B": np.ones((32, 8), np.float32)}
    content = save({f"{layer}.lora_{name}.weight": array for name, array in factors.items()})
    files = {"adapter_model.safetensors": content, "adapter_config.json": b'{"lora_alpha": 32}'}
    hub.add("peft/lora", files)
    for name in ("peft/lora", "peft/lora:adapter_model.safetensors"):
        assert load_adapter(find_weights(name, lora_files)).summary.strengths == (4.0,)


def test_autoencoders_and_previews(flux, tmp_path):
    tae = {
        name: shared_path(f"assets/tae/{name}").read_bytes()
        for name in ("taef1_encoder.safetensors", "taef1_decoder.safetensors")
    }
    flux.add("both/layouts", {**tae, "config.json": b"{}", "diffusion_pytorch_model.bin": b""})
    assert open_previewer("both/layouts").config.latent_channels == 16
    assert flux.fetched == tae.keys()
    assert open_autoencoder(f"{REPO}:vae").config.channels == (32, 32)
    main(["tiny_vae", "--src", "both/layouts", "--dst", str(tmp_path / "taef1")])
    assert (tmp_path / "taef1" / "model.safetensors").is_file()


def test_a_tiny_autoencoder_of_diffusers(hub, tmp_path, capsys):
    """As madebyollin/taef1 is on the hub: its decoder has one layer less than the two files'."""
    pair = shared_path("assets/tae/taef1_encoder.safetensors").with_name("taef1")
    theirs = open_taesd(pair)
    tensors = {}
    for name in theirs.shapes:
        net, layer, rest = name.split(".", 2)
        key = f"{net}.layers.{int(layer) - (net == 'decoder')}.{rest}"
        tensors[key] = theirs.read(name)
    folder = tmp_path / "diffusers"
    folder.mkdir()
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    (folder / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    hub.add_folder("madebyollin/taef1", folder)
    assert open_previewer("madebyollin/taef1").config.latent_channels == 16
    main(["tiny_vae", "--src", "madebyollin/taef1", "--dst", str(tmp_path / "made")])
    main(["verify", "--src", str(pair), "--dst", str(tmp_path / "made")])
    assert "134 tensors: 134 equal" in capsys.readouterr().out


def test_tokenizers(flux, folder):
    one = FolderTokenizer(f"{REPO}:tokenizer_2", 4)
    assert (
        one(["a red circle"]).tolist()
        == FolderTokenizer(folder / "tokenizer_2", 4)(["a red circle"]).tolist()
    )
    assert {name.partition("/")[0] for name in flux.fetched} == {"tokenizer_2"}
    stored = open_pipeline("shapes_base", REPO)
    assert {each.name for each in stored.tokenizers.iterdir()} == {"tokenizer", "tokenizer_2"}
    flux.add("no/tokenizers", {"a.safetensors": b""})
    with pytest.raises(UserError, match="no/tokenizers has no tokenizer nor tokenizer_2 nor"):
        open_pipeline("shapes_base", "no/tokenizers")


def test_conversion(flux, tmp_path, capsys):
    made = tmp_path / "made"
    main(["flux", "--src", REPO, "--dst", str(made)])
    assert "left out" not in capsys.readouterr().out
    main(["verify", "--src", f"{REPO}@main", "--dst", str(made)])
    assert capsys.readouterr().out.count("equal") == 4
    with pytest.raises(SystemExit, match=r"has weights in folders only|has several weights"):
        main(["t5", "--src", REPO, "--dst", str(tmp_path / "t5")])
    main(["t5", "--src", f"{REPO}:text_encoder_2", "--dst", str(tmp_path / "t5")])
    with pytest.raises(SystemExit, match="error: some/thing is not here, and no public model"):
        main(["inspect", "some/thing"])


def test_a_plan_fetches_nothing(flux):
    lora = LoRAConfig(rank=4)
    config = TrainConfig(
        "run", 1, base=REPO, lora=lora, data=DataConfig("folder:x", 2, 1024), plan="v5e-8"
    )
    models = open_models(config, published=True)
    assert models.transformer.num_double_blocks == 19
    assert flux.asked == []
    assert not is_here(REPO)
    open_pipeline(REPO)
    assert is_here(REPO)
    with pytest.raises(UserError, match=r"plan for flux1-dev, .* only what is in the cache"):
        open_models(TrainConfig(**(vars(config) | {"base": "some/thing"})), published=True)
    assert to_tree(config)["base"] == REPO


CONVERTED = [
    "pipeline.json",
    "transformer/config.json",
    "transformer/model.safetensors",
    "autoencoder/config.json",  # pixels have no weights
    "tokenizer/a.json",
]
SHARDED = [
    "config.json",
    "model.safetensors.index.fp16.json",
    "model.fp16-00001-of-00002.safetensors",
    "model.fp16-00002-of-00002.safetensors",
]


@pytest.mark.parametrize(
    ("select", "names", "files"),
    [
        (pipeline_files, ["flux.safetensors", "README.md"], ["flux.safetensors"]),
        (pipeline_files, [*CONVERTED, "other/model.safetensors"], CONVERTED),
        (
            model_files,
            ["config.json", "vocab.json", "model.safetensors", "model.fp16.safetensors", "a.bin"],
            ["config.json", "vocab.json", "model.safetensors"],
        ),
        (model_files, [*SHARDED, "model.fp32-00001-of-00009.safetensors"], SHARDED),
        (
            lora_files,
            ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"],
            ["adapter_model.safetensors", "adapter_config.json"],
        ),
        (
            tokenizer_folders,
            ["tokenizer/a", "tokenizer_3/b", "vae/c"],
            ["tokenizer/a", "tokenizer_3/b"],
        ),
    ],
)
def test_what_is_fetched_of_a_repository(select, names, files):
    assert sorted(select(HubId("owner/repo"), names).files) == sorted(files)
    inside = [f"x/{name}" for name in names]
    found = select(HubId("owner/repo", None, "x"), inside).files
    assert sorted(found) == sorted(f"x/{name}" for name in files)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.bin", "README.md"], r"owner/repo has no \.safetensors; it has README\.md, a\.bin"),
        (["transformer/config.json", "transformer/a.bin"], r"no \.safetensors in transformer; it"),
        (["vae/a.safetensors"], r"weights in folders only \(vae\); name one: owner/repo:FOLDER"),
    ],
)
def test_what_cannot_be_read_is_said(names, said):
    with pytest.raises(UserError, match=said):
        pipeline_files(HubId("owner/repo"), names)
