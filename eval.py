"""Stage 4: score label maps against the truth: IoU, FPR and FNR per class and in the mean.

    python eval.py --run runs/toy-resnet50               seeds and segmentation, whatever is there
    python eval.py --run runs/toy-resnet50 --sweep       also the best threshold that the truth can choose
    python eval.py --pred DIR --truth DIR                anybody's PNGs

Per class, over all pixels of the split that are not void:
    IoU = TP / (TP + FP + FN),   FPR = FP / (TP + FP + FN),   FNR = FN / (TP + FP + FN)      (they add up to 1)
Means run over the C + 1 classes, background included. MCTformer's and WeakTr's definition.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

import usage


def confusion_matrix(truth, predicted, num_classes):
    """Pixels by (true class, predicted class), void left out: two integer maps of one shape -> (C + 1, C + 1) int64."""
    valid = truth != usage.VOID
    pairs = truth[valid].long() * (num_classes + 1) + predicted[valid].long()
    return torch.bincount(pairs, minlength=(num_classes + 1) ** 2).view(num_classes + 1, num_classes + 1)


def metrics(confusion):
    """(C + 1, C + 1) -> {"IoU", "FPR", "FNR"}, each (C + 1,) float64; NaN for a class in neither truth nor prediction."""
    true_positive = confusion.diag().double()
    false_positive, false_negative = confusion.sum(0) - true_positive, confusion.sum(1) - true_positive
    union = true_positive + false_positive + false_negative
    return {"IoU": true_positive / union, "FPR": false_positive / union, "FNR": false_negative / union}


def count_levels(truth, classes, levels, num_classes):
    """Pixels by (true class, strongest class, its score), void left out: enough for every threshold at once.

    truth (H, W), classes (K,), levels (K, H, W) uint8: scores * 255 -> (C + 1, C + 1, 256) int64.
    """
    shape = (num_classes + 1, num_classes + 1, 256)
    if len(classes):
        best, winner = levels.max(0)                                                # (K, H, W) -> (H, W)
        predicted = classes[winner] + 1
    else:
        best = predicted = torch.zeros_like(truth)
    valid = truth != usage.VOID
    cells = (truth[valid].long() * shape[1] + predicted[valid].long()) * 256 + best[valid].long()
    return torch.bincount(cells, minlength=math.prod(shape)).view(shape)


def at_threshold(counts, threshold):
    """The confusion matrix (C + 1, C + 1) that `usage.label_map` would give at a threshold, from `count_levels`."""
    above = torch.arange(256) / 255 > threshold
    matrix = counts[..., above].sum(-1)
    matrix[:, 0] += counts[..., ~above].sum((1, 2))                                 # what is not above is background
    return matrix


def summary(confusion, classes, **facts):
    """What report.json holds of one confusion matrix: the facts given, means, area, and the three rates per class."""
    rates = metrics(confusion)
    area = (confusion[:, 1:].sum() / confusion[1:].sum()).item()                    # predicted over true foreground
    means = {name: rate.nanmean().item() for name, rate in rates.items()}
    per_class = {name: {key: rate[c].item() for key, rate in rates.items()}
                 for c, name in enumerate(["background", *classes]) if not rates["IoU"][c].isnan()}
    return {**facts, "mIoU": means["IoU"], "FPR": means["FPR"], "FNR": means["FNR"], "area": area, "classes": per_class}


def show(entry):
    labels = f"{entry['labels']} labels, " if "labels" in entry else ""
    print(f"\n{entry['what']}: {entry['data']}, {entry['split']}, {entry['images']} images, {labels}threshold "
          f"{entry['threshold']}")
    print(f"  {'':16}    IoU    FPR    FNR")
    for name, rate in entry["classes"].items():
        print(f"  {name:16} {rate['IoU']:6.3f} {rate['FPR']:6.3f} {rate['FNR']:6.3f}")
    print(f"  {'mean':16} {entry['mIoU']:6.3f} {entry['FPR']:6.3f} {entry['FNR']:6.3f}   "
          f"foreground {entry['area']:.2f} x the true area")


def progress(ids):
    """Yield the ids, with a line of progress."""
    start = time.time()
    for done, name in enumerate(ids, start=1):
        yield name
        if done % 50 == 0 or done == len(ids):
            rate = done / (time.time() - start)
            print(f"\r{done} of {len(ids)} images  {rate:.0f} images/s  {(len(ids) - done) / rate:.0f} s left ", end="",
                  flush=True)


def compare(ids, folder, true_mask, num_classes):
    """The confusion matrix of the label maps <id>.png of a folder against true_mask(id)."""
    confusion = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    for name in progress(ids):
        truth, path = true_mask(name), folder / f"{name}.png"
        predicted = usage.read_mask(path, truth.shape, num_classes)
        if (predicted == usage.VOID).any():
            raise usage.InputError(f"{path}: has void (255), a prediction must not; score a run's pseudo masks by --run")
        confusion += confusion_matrix(truth, predicted, num_classes)
    return confusion


def score_run(run, data_root, with_sweep):
    """Entries of report.json for what is found in a run folder."""
    entries = []
    for what, path in (("seeds", run / "seeds.json"), ("segmentation", run / "segmentation.json")):
        if not path.is_file():
            continue
        settings = usage.read_json(path)
        data = usage.open_data(data_root or settings["data"])
        usage.check_classes(data, settings["classes"], run)
        split = "train" if settings["split"] == "train_aug" else settings["split"]  # the part of it that has masks
        ids, folder = data.split(split), run / what
        missing = [name for name in ids if not (folder / f"{name}.png").is_file()]
        if missing:
            raise usage.InputError(f"{folder / missing[0]}.png: not there; run the stage that writes {folder} to its end")
        facts = {"data": str(data.root), "split": split, "images": len(ids)}
        if what == "seeds":
            entries += score_seeds(run, data, ids, settings, facts, with_sweep)
        else:
            confusion = compare(ids, folder, data.mask, len(data.classes))
            threshold = "none (argmax, refined)" if settings["refine"] else "none (argmax)"
            entries.append(summary(confusion, data.classes, what=what, threshold=threshold, **facts))
    if not entries:
        raise usage.InputError(f"{run}: nothing to score; run make_seeds.py --run {run} first")
    return entries


def score_seeds(run, data, ids, settings, facts, with_sweep):
    """Entries for the seeds, at the fixed threshold and at the best one, and for the pseudo masks made of them.

    Pixels that a pseudo mask leaves void count as what they would be without.
    """
    shape = (len(data.classes) + 1, len(data.classes) + 1, 256)
    counts = {"levels": torch.zeros(shape, dtype=torch.int64), "refined": torch.zeros(shape, dtype=torch.int64)}
    for name in progress(ids):
        classes, scores = load_scores(run, name)
        truth = data.mask(name, scores["levels"].shape[1:])
        for kind, levels in scores.items():
            counts[kind] += count_levels(truth, classes, levels, len(data.classes))
    facts |= {"labels": "given" if settings["class_threshold"] is None else "predicted"}
    fixed = facts | {"threshold": f"{settings['threshold']} (fixed beforehand)"}
    entries = [summary(at_threshold(counts["levels"], settings["threshold"]), data.classes, what="seeds", **fixed)]
    if settings["refine"]:
        matrix = at_threshold(counts["refined"], settings["threshold"])
        entries.append(summary(matrix, data.classes, what="pseudo masks", **fixed))
    if with_sweep:
        matrices = [at_threshold(counts["levels"], threshold) for threshold in torch.arange(101) / 100]
        curve = [summary(matrix, data.classes) for matrix in matrices]
        best = int(np.argmax([point["mIoU"] for point in curve]))
        facts |= {"what": "seeds, oracle", "threshold": f"{best / 100} (ORACLE: the best of 101 on these very masks)"}
        curve = {f"{key} at 0.00, 0.01 ... 1.00": [point[key] for point in curve] for key in ("mIoU", "area")}
        entries.append(summary(matrices[best], data.classes, **facts) | curve)
    return entries


def load_scores(run, name):
    """Of one image's scores: the classes (K,), and {"levels", and "refined" if there are any: (K, H, W) uint8}."""
    path = run / f"scores/{name}.npz"
    try:
        with np.load(path) as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file}
        return arrays.pop("classes"), arrays
    except Exception as error:
        raise usage.InputError(f"{path}: not readable as scores ({error}); remove it and seeds/{name}.png, and run "
                               "make_seeds.py again") from error


def score_folders(predicted, truth, classes):
    """The entry of report.json for two folders of PNGs."""
    for folder in (predicted, truth):
        if not folder.is_dir():
            raise usage.InputError(f"{folder}: no such folder; --pred and --truth take folders of label PNGs")
    if predicted.resolve() == truth.resolve():
        raise usage.InputError(f"{predicted}: --pred and --truth are one folder; nothing would be measured")
    ids = sorted(path.stem for path in predicted.glob("*.png"))
    if not ids:
        raise usage.InputError(f"{predicted}: no .png in it; nothing to score")

    def true_mask(name):
        return usage.read_mask(truth / f"{name}.png", None, len(classes))
    confusion = compare(ids, predicted, true_mask, len(classes))
    split = f"every png of {predicted} ({len(list(truth.glob('*.png')))} in the truth)"
    return [summary(confusion, classes, what="label maps", data=str(truth), split=split, images=len(ids),
                    threshold="none (label maps)")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", type=Path, help="a run folder (default runs/toy-resnet50); writes report.json into it")
    add("--data", help="where the data lies now, if it has moved since stage 1")
    add("--sweep", action="store_true", help="also the oracle threshold of the seeds: the best one, chosen on the truth")
    add("--pred", type=Path, help="a folder of label PNGs to score against --truth, instead of a run")
    add("--truth", type=Path, help="a folder of label PNGs: 0 background, 1 to C the classes, 255 void")
    add("--classes", type=Path, help="for --pred: a file with the class names, one a line (default: VOC's 20)")
    args = parser.parse_args()
    if args.pred or args.truth:
        if not (args.pred and args.truth) or args.run:
            raise usage.InputError("pass --pred and --truth together and no --run, or --run alone")
        if args.classes and not args.classes.is_file():
            raise usage.InputError(f"{args.classes}: no such file; write the class names into it, one a line")
        entries = score_folders(args.pred, args.truth,
                                args.classes.read_text().splitlines() if args.classes else usage.VOC_CLASSES)
    else:
        args.run = args.run or Path("runs/toy-resnet50")
        entries = score_run(args.run, args.data, args.sweep)
        with usage.written(args.run / "report.json") as temporary:
            temporary.write_text(json.dumps(entries, indent=1))
    for entry in entries:
        show(entry)


if __name__ == "__main__":
    with usage.one_line_errors("run the same command again"):
        main()
