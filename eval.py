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


def sweep(items, num_classes):
    """Confusion matrices at the thresholds 0.00, 0.01 ... 1.00 from one pass.

    items yields (truth (H, W), classes (K,), levels (K, H, W) uint8: scores * 255) -> (101, C + 1, C + 1) int64.
    """
    counts = torch.zeros((num_classes + 1) ** 2 * 256, dtype=torch.int64)
    for truth, classes, levels in items:
        if len(classes):
            best, winner = levels.max(0)                                            # (K, H, W) -> (H, W)
            predicted = classes[winner] + 1
        else:
            best = predicted = torch.zeros_like(truth)
        valid = truth != usage.VOID
        cells = (truth[valid].long() * (num_classes + 1) + predicted[valid].long()) * 256 + best[valid].long()
        counts += torch.bincount(cells, minlength=len(counts))
    counts = counts.view(num_classes + 1, num_classes + 1, 256)                     # true class, strongest class, level
    matrices = []
    for threshold in torch.arange(101) / 100:
        above = torch.arange(256) / 255 > threshold                                 # as in usage.label_map
        matrix = counts[..., above].sum(-1)
        matrix[:, 0] += counts[..., ~above].sum((1, 2))                             # what is not above is background
        matrices.append(matrix)
    return torch.stack(matrices)


def summary(confusion, classes, **facts):
    """What report.json holds of one confusion matrix: the facts given, means, area, and the three rates per class."""
    rates = metrics(confusion)
    area = (confusion[:, 1:].sum() / confusion[1:].sum()).item()                    # predicted over true foreground
    means = {name: rate.nanmean().item() for name, rate in rates.items()}
    per_class = {name: {key: rate[c].item() for key, rate in rates.items()}
                 for c, name in enumerate(["background", *classes]) if not rates["IoU"][c].isnan()}
    return {**facts, "mIoU": means["IoU"], "FPR": means["FPR"], "FNR": means["FNR"], "area": area, "classes": per_class}


def show(entry):
    print(f"\n{entry['what']}: {entry['data']}, {entry['split']}, {entry['images']} images, threshold {entry['threshold']}")
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


def compare(ids, predicted_folder, truth_folder, num_classes):
    """The confusion matrix of the label maps <id>.png of one folder against those of another."""
    confusion = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    for name in progress(ids):
        truth = usage.read_mask(truth_folder / f"{name}.png", None, num_classes)
        path = predicted_folder / f"{name}.png"
        predicted = usage.read_mask(path, truth.shape, num_classes)
        if (predicted == usage.VOID).any():
            raise usage.InputError(f"{path}: a prediction has no void (255); give every pixel a class")
        confusion += confusion_matrix(truth, predicted, num_classes)
    return confusion


def score_run(run, data_root, with_sweep):
    """Entries of report.json for what is found in a run folder."""
    entries = []
    for what, path in (("seeds", run / "seeds.json"), ("segmentation", run / "segmentation.json")):
        if not path.is_file():
            continue
        settings = usage.read_json(path)
        data = usage.VocFolder(data_root or settings["data"])
        usage.check_classes(data, settings["classes"], run)
        split = "train" if settings["split"] == "train_aug" else settings["split"]  # the part of it that has masks
        ids, num_classes = data.split(split), len(data.classes)
        folder = run / what
        missing = [name for name in ids if not (folder / f"{name}.png").is_file()]
        if missing:
            raise usage.InputError(f"{folder / missing[0]}.png: not there; run the stage that writes {folder} to its end")
        facts = {"what": what, "data": str(data.root), "split": split, "images": len(ids)}
        confusion = compare(ids, folder, data.masks, num_classes)
        threshold = f"{settings['threshold']} (fixed beforehand)" if what == "seeds" else "none (argmax)"
        entries.append(summary(confusion, data.classes, **facts, threshold=threshold))
        if what == "seeds" and with_sweep:
            matrices = sweep((load_scores(run, data, name) for name in progress(ids)), num_classes)
            curve = [metrics(matrix)["IoU"].nanmean().item() for matrix in matrices]
            best = int(np.argmax(curve))
            facts |= {"what": "seeds, oracle", "threshold": f"{best / 100} (ORACLE: the best of 101 on these very masks)"}
            entries.append(summary(matrices[best], data.classes, **facts) | {"mIoU at 0.00, 0.01 ... 1.00": curve})
    if not entries:
        raise usage.InputError(f"{run}: nothing to score; run make_seeds.py --run {run} first")
    return entries


def load_scores(run, data, name):
    """(truth, classes, levels) of one image for `sweep`."""
    path = run / f"scores/{name}.npz"
    try:
        with np.load(path) as file:
            classes, levels = torch.from_numpy(file["classes"]), torch.from_numpy(file["levels"])
    except Exception as error:
        raise usage.InputError(f"{path}: not readable as scores ({error}); remove it and seeds/{name}.png, and run "
                               "make_seeds.py again") from error
    return usage.read_mask(data.masks / f"{name}.png", levels.shape[1:], len(data.classes)), classes, levels


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
    confusion = compare(ids, predicted, truth, len(classes))
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
