"""Stage 4: compare label maps with the truth: IoU, FPR and FNR per class and in the mean.

    python eval.py --run runs/toy-resnet50               seeds and segmentation, whatever is there
    python eval.py --run runs/toy-resnet50 --sweep       also the best threshold that the truth can choose
    python eval.py --pred DIR --truth DIR                anybody's PNGs

Writes report.json into the run folder. Per class, over all pixels of the split that are not void:
    IoU = TP / (TP + FP + FN),   FPR = FP / (TP + FP + FN),   FNR = FN / (TP + FP + FN)      (they add up to 1)
Means run over the C + 1 classes, background included. MCTformer's and WeakTr's definition.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import usage


def metrics(confusion):
    """(C + 1, C + 1) -> {"IoU", "FPR", "FNR"}, each (C + 1,) float64; NaN for a class in neither truth nor prediction."""
    true_positive = confusion.diag().double()
    false_positive, false_negative = confusion.sum(0) - true_positive, confusion.sum(1) - true_positive
    union = true_positive + false_positive + false_negative
    return {"IoU": true_positive / union, "FPR": false_positive / union, "FNR": false_negative / union}


def count_levels(truth, labels, levels, num_classes):
    """Pixels by (true class, predicted class, its level), void left out: enough for every threshold at once.

    truth, labels (H, W): 0 background, c + 1 for class c; levels (H, W) in 0 ... 255 -> (C + 1, C + 1, 256) int64.
    """
    shape = (num_classes + 1, num_classes + 1, 256)
    valid = truth != usage.VOID
    cells = (truth[valid].long() * shape[1] + labels[valid].long()) * 256 + levels[valid].long()
    return torch.bincount(cells, minlength=math.prod(shape)).view(shape)


def at_threshold(counts, threshold):
    """The confusion matrix (C + 1, C + 1), from `count_levels`: levels / 255 not above the threshold are background."""
    above = torch.arange(256) / 255 > threshold
    matrix = counts[..., above].sum(-1)
    matrix[:, 0] += counts[..., ~above].sum((1, 2))                                 # what is not above is background
    return matrix


def summary(confusion, classes, **facts):
    """What report.json holds of one confusion matrix: the facts given, means, area, and the three rates per class."""
    rates = metrics(confusion)
    area = (confusion[:, 1:].sum() / confusion[1:].sum()).item()                    # predicted over true foreground
    means = {"m" * (name == "IoU") + name: rate.nanmean().item() for name, rate in rates.items()} | {"area": area}
    means = {name: value if math.isfinite(value) else None for name, value in means.items()}     # JSON has no NaN
    per_class = {name: {key: rate[c].item() for key, rate in rates.items()}
                 for c, name in enumerate(["background", *classes]) if not rates["IoU"][c].isnan()}
    return {**facts, **means, "classes": per_class}


def show(entry):
    """Print an entry of report.json as a table."""
    labels = f"{entry['labels']} labels, " if "labels" in entry else ""
    print(f"\n{entry['what']}: {entry['data']}, {entry['split']}, {entry['images']} images, {labels}threshold "
          f"{entry['threshold']}\n  {'':16}    IoU    FPR    FNR")
    for name, rate in entry["classes"].items():
        print(f"  {name:16} {rate['IoU']:6.3f} {rate['FPR']:6.3f} {rate['FNR']:6.3f}")
    if entry["mIoU"] is not None and entry["area"] is not None:
        print(f"  {'mean':16} {entry['mIoU']:6.3f} {entry['FPR']:6.3f} {entry['FNR']:6.3f}   "
              f"foreground {entry['area']:.2f} x the true area")


def progress(names):
    """Yield the names, with a line of progress."""
    for done, name in enumerate(names, start=1):
        yield name
        if done % 50 == 0 or done == len(names):
            print(f"\r{done} of {len(names)} images ", end="", flush=True)


def compare(ids, folder, masks, num_classes):
    """The confusion matrix of the label maps <id>.png of a folder against those of another, the true masks."""
    counts = 0
    for name in progress(ids):
        path, truth = folder / f"{name}.png", usage.read_mask(masks / f"{name}.png", None, num_classes)
        labels = usage.read_mask(path, truth.shape, num_classes)
        if (labels == usage.VOID).any():
            raise usage.InputError(f"{path}: has void (255), a prediction must not; measure a run's pseudo masks by --run")
        counts += count_levels(truth, labels, torch.full_like(labels, 255), num_classes)
    return at_threshold(counts, 0)


def measure_run(run, data_root, with_sweep):
    """Entries of report.json for what is found in a run folder."""
    entries, made_of = [], {}
    for what, path in (("seeds", run / "seeds.json"), ("segmentation", run / "segmentation.json")):
        if not path.is_file():
            continue
        keys = ["threshold", "class_threshold"] if what == "seeds" else ["refine"]
        settings = usage.read_json(path, ["data", "classes", "split", "classifier", *keys])
        usage.check_settings(path, settings, made_of, f"remove it and {what}, and run train_seg.py again")
        made_of = {"classifier": settings["classifier"]}        # segmentation must be of the same
        data = usage.open_run_data(run, settings, data_root)
        split = "train" if settings["split"] == "train_aug" else settings["split"]  # the part of it that has masks
        if split not in data.splits or not data.has_masks(data.ids(split)):
            print(f"{what} of {split}: no list of it, or no true masks in {data.masks}, not measured")
            continue
        ids, folder = data.ids(split), run / what
        missing = [name for name in ids if not usage.is_there(folder / f"{name}.png")]
        if missing:
            raise usage.InputError(f"{folder / missing[0]}.png: not there; run the stage that writes {folder} to its end")
        if data.is_coco and not all(usage.is_there(data.masks / f"{name}.png") for name in ids):
            draw_coco_masks(data, split)
        facts = {"data": str(data.root), "split": split, "images": len(ids)}
        if what == "seeds":
            entries += measure_seeds(run, data, ids, settings, facts, with_sweep)
        else:
            confusion = compare(ids, folder, data.masks, len(data.classes))
            threshold = "none (argmax, refined)" if settings["refine"] else "none (argmax)"
            entries.append(summary(confusion, data.classes, what=what, threshold=threshold, **facts))
    return entries or usage.fail(f"{run}: nothing to measure; run make_seeds.py for it, add true masks, or correct flags")


def measure_seeds(run, data, ids, settings, facts, with_sweep):
    """Entries for the seeds, at the fixed threshold and at the best one, and for the pseudo masks made of them.

    Pixels that a pseudo mask leaves void count as what they would be without.
    """
    counts, threshold = {"seeds": 0, "pseudo masks": 0}, settings["threshold"]
    for name in progress(ids):
        classes, *both = usage.load_maps(run / f"maps/{name}.npz", len(data.classes))
        truth = usage.read_mask(data.masks / f"{name}.png", both[0].shape[1:], len(data.classes))
        for what, maps in zip(counts, both):
            labels = usage.label_map(maps[None], 0, classes)[0]                         # (H, W), 0 where all maps are 0
            levels = F.pad(maps, (0, 0, 0, 0, 1, 0)).amax(0)                            # (1 + K, H, W) -> (H, W)
            counts[what] += count_levels(truth, labels, levels, len(data.classes))
    facts |= {"labels": "given" if settings["class_threshold"] is None else "predicted"}
    entries = [summary(at_threshold(counts[what], threshold), data.classes, what=what, **facts,
                       threshold=f"{threshold} (fixed beforehand)") for what in counts]
    if with_sweep:
        matrices = [at_threshold(counts["seeds"], step) for step in torch.arange(101) / 100]
        curve = [summary(matrix, data.classes) for matrix in matrices]
        best = int(np.argmax([point["mIoU"] or 0 for point in curve]))
        facts |= {"what": "seeds, oracle", "threshold": f"{best / 100} (ORACLE: the best of 101 on these very masks)"}
        curve = {f"{key} at 0.00, 0.01 ... 1.00": [point[key] for point in curve] for key in ("mIoU", "area")}
        entries.append(summary(matrices[best], data.classes, **facts) | curve)
    return entries


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = usage.fail
    add = parser.add_argument
    add("--run", type=Path, help="a run folder (default runs/toy-resnet50); writes report.json into it")
    add("--data", help="where the data lies now, if it has moved since stage 1")
    add("--sweep", action="store_true", help="also the oracle threshold of the seeds: the best one, chosen on the truth")
    add("--pred", type=Path, help="a folder of label PNGs to compare with --truth, instead of a run")
    add("--truth", type=Path, help="a folder of label PNGs: 0 background, 1 to C the classes, 255 void")
    add("--classes", type=Path, help="for --pred: a file with the class names, one a line (default: VOC's 20)")
    args = parser.parse_args()
    run = args.run or Path("runs/toy-resnet50")
    if args.pred or args.truth or args.classes:
        if not (args.pred and args.truth) or args.run or args.data or args.sweep:
            raise usage.InputError("pass --pred and --truth, no --run, --data or --sweep; a run knows its --classes")
        if args.pred.resolve() == args.truth.resolve():
            raise usage.InputError(f"{args.pred}: --pred and --truth are one folder; nothing would be measured")
        classes = usage.read_classes(args.classes) if args.classes else usage.VOC_CLASSES
        ids, truths = (list(usage.image_files(folder, (".png",))) for folder in (args.pred, args.truth))
        confusion, split = compare(ids, args.pred, args.truth, len(classes)), f"every png of {args.pred}"
        entries = [summary(confusion, classes, what="label maps", data=str(args.truth), images=len(ids),
                           split=f"{split} ({len(truths)} in the truth)", threshold="none (label maps)")]
    else:
        entries = measure_run(run, args.data, args.sweep)
    for entry in entries:
        show(entry)
    if not args.pred:
        usage.write_json(run / "report.json", entries)


# ==== MS COCO's masks =================================================================================================


def draw_coco_masks(data, split):
    """Draw the true masks of a split from COCO's outlines: small objects over large ones, crowds void."""
    path = data.root / f"annotations/instances_{split}2014.json"
    print(f"{path}: drawing the true masks, for the first time", flush=True)
    with usage.reading(path, "not COCO's instances: fetch it again"):
        table = json.loads(path.read_bytes())
        labels = {category["id"]: data.classes.index(category["name"]) + 1 for category in table["categories"]}
        objects = {image["id"]: [] for image in table["images"]}
        for entry in sorted(table.pop("annotations"), key=lambda entry: (not entry["iscrowd"], -entry["area"])):
            objects[entry["image_id"]].append(entry)
    for image in progress(table["images"]):
        drawn = data.masks / f"{Path(image['file_name']).stem}.png"
        if usage.is_there(drawn):
            continue
        with usage.reading(path, f"an outline of {image['file_name']} cannot be drawn: fetch it again"):
            mask = np.zeros((image["height"], image["width"]), np.uint8)
            for entry in objects[image["id"]]:
                mask[draw_outline(entry["segmentation"], *mask.shape)] = (
                    usage.VOID if entry["iscrowd"] else labels[entry["category_id"]])
        usage.save_mask(drawn, mask)


def draw_outline(outline, height, width):
    """An object of COCO's as (H, W) bool: a list of polygons [x, y, x, y, ...], or runs {"counts": ..., "size": [H, W]}.

    Runs are lengths down the columns, first of background, then of the object, and so on. Format: COCO's maskApi.
    """
    if isinstance(outline, list):
        fine = 4                                                    # drawn larger: Pillow's polygons include their edges
        canvas = Image.new("L", (fine * width, fine * height))
        for polygon in outline:
            ImageDraw.Draw(canvas).polygon([(fine * x, fine * y) for x, y in zip(polygon[::2], polygon[1::2])], fill=255)
        return np.array(canvas.reduce(fine)) > 150
    runs = outline["counts"]
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


if __name__ == "__main__":
    with usage.one_line_errors("run the same command again"):
        main()
