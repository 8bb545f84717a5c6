"""``make zoo``: goes over the networks of timm and torchvision, and writes what the engine makes of each to a table.

Weights are random, images small where the network allows it. Each row is written as soon as it is there; a run that was interrupted
goes on behind the last one. ``python -m rse_fast.bench.zoo --again '*swin*'`` measures some of them again.
"""

import argparse
import fnmatch
import json
import time
import warnings
from pathlib import Path

import torch

import rse_fast
from rse_fast.nn import noise_layers

IMAGES, DRAWS = 2, 5
SIZES = (64, 128, 160)  # tried before the network's own

# One or two of each family; the smallest that there is.
TIMM = """
beit_base_patch16_224 halonet_h1 eca_botnext26ts_256 lambda_resnet26t lambda_resnet26rpt_256 mobileone_s1 gernet_s cait_xxs24_224
coat_tiny coat_lite_tiny convit_tiny convmixer_768_32 convnext_zepto_rms convnextv2_atto cpubone_nano crossvit_tiny_240
crossvit_9_dagger_240 csatv2 cs3darknet_focus_s darknet17 cspresnet50 cspnext_tiny davit_tiny deit_tiny_patch16_224
deit_tiny_distilled_patch16_224 deit3_small_patch16_224 densenet121 densenetblur121d dla46x_c dla34 dpn48b dpn68 edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 mobilenetv2_035 efficientnet_b0 efficientnet_lite0 mnasnet_small mixnet_s efficientvim_m1
efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 ghostnetv2_100
ghostnetv3_050 hardcorenas_a hgnetv2_b0 hgnet_tiny hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t inception_next_atto
inception_v3 inception_v4 inception_resnet_v2 lcnetv2_small levit_128s levit_conv_128s lowformer_b0 mambaout_femto maxvit_pico_rw_256
coatnet_pico_rw_224 coatnet_0_rw_224 poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18 gmlp_ti16_224 gmixer_12_224
resmlp_12_224 mixer_s32_224 lcnet_035 mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium mobilevit_xxs
mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small nf_regnet_b0 nf_resnet26 dm_nfnet_f0 pit_ti_224 pit_ti_distilled_224 pvt_v2_b0
pvt_v2_b2_li rdnet_tiny regnetx_002 regnety_002 repghostnet_050 repvit_m1 res2next50 res2net50_14w_8s resnest14d resnest26d resnet10t
resnet18 resnetblur18 seresnet18 ecaresnet26t resnext26ts wide_resnet50_2 resnetv2_18 resnetv2_50 rexnet_100 selecsls42
legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swin_s3_tiny_224
swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small
twins_pcpvt_small vgg11 vgg11_bn visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_srelpos_small_patch16_224
samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41 xcit_nano_12_p16_224
xcit_nano_12_p8_224
""".split()
TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2
mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d wide_resnet50_2 shufflenet_v2_x0_5 squeezenet1_1 swin_t
swin_v2_t vgg11 vgg16_bn vit_b_32
""".split()
NAMES = [*(f"timm {name}" for name in TIMM), *(f"torchvision {name}" for name in TORCHVISION)]

COLUMNS = ("model", "image", "noisy layers", "fused", "difference", "speed-up", "revert")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="GLOB", help="only these, such as '*swin*'")
    parser.add_argument("--again", action="store_true", help="measure also what has a row")
    parser.add_argument("--rows", type=Path, default=Path("bench-results-zoo.jsonl"), help="rows so far (default: %(default)s)")
    parser.add_argument("--table", type=Path, default=Path("bench/results/zoo.md"), help="default: %(default)s")
    args = parser.parse_args(argv)
    found = read(args.rows)
    for name in NAMES:
        wanted = not args.names or any(fnmatch.fnmatch(name, pattern) for pattern in args.names)
        if not wanted or (name in found and not args.again):
            continue
        begin = time.perf_counter()
        try:
            found[name] = measure(name)
        except Exception as error:  # of any network: it is a row of the table
            found[name] = {"problem": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        with args.rows.open("a") as file:
            file.write(json.dumps({"model": name, **found[name]}) + "\n")
        print(f"{name}: {found[name]} ({time.perf_counter() - begin:.0f} s)", flush=True)
        args.table.write_text(table(found))
    args.table.write_text(table(found))
    return 0


def read(path: Path) -> dict[str, dict]:
    """The rows of a file by model, the last one of each; a line that was cut off is not there."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row.pop("model")] = row
    return found


def measure(name: str) -> dict:
    """What the engine makes of one network, by its name with the library's before it."""
    torch.manual_seed(0)
    model, shape = build(*name.split(" "))
    x = torch.rand(IMAGES, *shape, generator=torch.Generator().manual_seed(1))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        plain = model(x)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        rse_fast.convert(model, 0.1, 0.1)
        row = {"image": "x".join(map(str, shape)), "layers": len(noise_layers(model))}
        ensemble = rse_fast.Ensemble(model, DRAWS, seed=2, dtype="float32", algorithm="direct")
        unfused = rse_fast.Ensemble(model, DRAWS, seed=2, dtype="float32", fuse=False)
        with torch.no_grad():
            expected = unfused(x)
            row["difference"], row["largest"] = float((ensemble(x) - expected).abs().max()), float(expected.abs().max())
        row["why"] = ensemble.prepared(x).problem
        remarks = [str(w.message).removeprefix("rse-fast: ") for w in warned if issubclass(w.category, RuntimeWarning)]
        row["remarks"] = [text for text in remarks if "runs unfused" not in text]
        row["speed_up"] = speed_up(model, ensemble, x)
    rse_fast.revert(model)
    after = model.state_dict()
    with torch.no_grad():
        same = torch.equal(model(x), plain)
    row["revert"] = same and after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    return row


def speed_up(model, ensemble, x) -> float:
    """Time of the loop over draws that one writes without this package's ensemble, over that of the ensemble; least of two, in turns."""
    times = [[], []]

    def loop():
        with torch.no_grad():
            return sum(model(x).softmax(-1) for _ in range(DRAWS)) / DRAWS

    for _ in range(2):
        for run, spent in zip((loop, lambda: ensemble.predict(x)), times, strict=True):
            begin = time.perf_counter()
            run()
            spent.append(time.perf_counter() - begin)
    return min(times[0]) / min(times[1])


def build(library: str, name: str) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    """The network with 10 classes in eval mode, and the shape of the smallest images that it takes of those tried."""
    import_torchvision()
    if library == "timm":
        import timm

        own = timm.get_pretrained_cfg(name).input_size

        def make(size):
            if size != own[-1] and timm.get_pretrained_cfg(name).fixed_input_size:
                return timm.create_model(name, num_classes=10, img_size=size)
            return timm.create_model(name, num_classes=10)
    else:
        import torchvision

        own = (3, 299 if name == "inception_v3" else 224, 0)
        options = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}

        def make(size):
            return torchvision.models.get_model(name, num_classes=10, **options)

    for size in (*SIZES, own[1]):
        shape = own[0], size, size
        try:
            with warnings.catch_warnings(), torch.device("meta"), torch.no_grad():
                warnings.simplefilter("ignore")
                make(size).eval()(torch.empty(2, *shape))
        except Exception:  # too small for it, or not made for the meta device
            continue
        return make(size).eval(), shape
    return make(own[1]).eval(), (own[0], own[1], own[1])


def import_torchvision() -> None:
    """Beside a torch for CPUs, the torchvision of the package index lacks its compiled operators, and its import fails where it describes
    one. Their schemas are enough for its networks, and for timm."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)  # they go when it does
        import torchvision  # noqa: F401


_schemas: list[torch.library.Library] = []


def table(found: dict[str, dict]) -> str:
    """The page of all rows, with the sums above them."""
    rows = {name: found[name] for name in NAMES if name in found}
    done = {name: row for name, row in rows.items() if "problem" not in row}
    fused = [row for row in done.values() if row["why"] is None]
    ratios = sorted(row["speed_up"] for row in done.values())
    ratio = f"{ratios[len(ratios) // 2]:.2f}" if ratios else "unknown"
    largest = max((row["difference"] / max(1, row.get("largest", 1)) for row in done.values()), default=0)
    lines = [
        "# Networks of timm and torchvision",
        "",
        f"Written by `make zoo` with torch {torch.__version__}: random weights, {IMAGES} images in {DRAWS} draws, float32,",
        f"`algorithm='direct'`, {torch.get_num_threads()} thread(s) of a CPU that others used at the same time.",
        "",
        "- Difference: the largest between log-probabilities of the fused and of the unfused ensemble. Where random weights make the",
        "  largest of them more than 100, it stands there as well.",
        "- Speed-up: of `predict` over a loop of single draws of the converted network.",
        "- Revert: whether `revert` brings back outputs, names and weights bit for bit.",
        "",
        f"{len(rows)} of {len(NAMES)} networks measured: {len(done)} work, {len(fused)} of them fused, and",
        f"{sum(row['revert'] for row in done.values())} come back bit for bit. Largest difference {largest:.1e}, relative to the largest",
        f"log-probability where that is above 1. Median speed-up {ratio}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    notes = []
    for name, row in rows.items():
        if "problem" in row:
            lines.append(f"| {name} | | | fails: {row['problem'].replace('|', '/')} | | | |")
            continue
        why = "yes" if row["why"] is None else f"no: {row['why'].replace('|', '/')}"
        revert = "exact" if row["revert"] else "NOT exact"
        difference = f"{row['difference']:.1e}" + (f" of {row['largest']:.1e}" if row.get("largest", 0) > 100 else "")
        lines.append(f"| {name} | {row['image']} | {row['layers']} | {why} | {difference} | {row['speed_up']:.2f} | {revert} |")
        notes += [f"- {name}: {remark}" for remark in dict.fromkeys(row["remarks"])]
    return "\n".join([*lines, *(["", "## Warnings", "", *notes] if notes else [])]) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
