"""Stage 4: compare label maps with the true masks: IoU, FPR and FNR of each class, and their means.

    python eval.py --run runs/toy-resnet50              seeds, pseudo masks and segmentation
    python eval.py --run runs/toy-resnet50 --sweep      also at the best thresholds
    python eval.py --pred DIR --truth DIR               any two folders of label PNGs

Writes report.json into the run folder. Per class, over all pixels of the split that are not void:

    IoU = TP / (TP + FP + FN),   FPR = FP / (TP + FP + FN),   FNR = FN / (TP + FP + FN)

They add up to 1: FPR and FNR are shares of the union here, as in MCTformer and WeakTr, not the
usual rates. Means run over the classes that the truth has, background included. Pseudo masks are
measured with their void pixels filled.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import usage

THRESHOLDS = torch.arange(101) / 100        # of --sweep


def metrics(confusion):
    """(C + 1, C + 1) -> {"IoU", "FPR", "FNR"}, each (C + 1,) float64.

    NaN for a class in neither truth nor prediction.
    """
    true_positive = confusion.diag().double()
    false_positive = confusion.sum(0) - true_positive
    false_negative = confusion.sum(1) - true_positive
    union = true_positive + false_positive + false_negative
    return {"IoU": true_positive / union, "FPR": false_positive / union,
            "FNR": false_negative / union}


def count_levels(truth, labels, levels, num_classes):
    """Pixels by (true class, predicted class, its level), without void: enough for any threshold.

    truth, labels (H, W): 0 background, c + 1 for class c; levels (H, W) in 0 ... 255
    -> (C + 1, C + 1, 256) int64.
    """
    shape = (num_classes + 1, num_classes + 1, 256)
    valid = truth != usage.VOID
    pairs = truth[valid].long() * shape[1] + labels[valid].long()
    cells = pairs * 256 + levels[valid].long()
    return torch.bincount(cells, minlength=math.prod(shape)).view(shape)


def at_threshold(counts, threshold):
    """The confusion matrix (C + 1, C + 1) of `count_levels`.

    Where a level / 255 is not above the threshold, background is predicted.
    """
    above = torch.arange(256) / 255 > threshold
    matrix = counts[..., above].sum(-1)
    matrix[:, 0] += counts[..., ~above].sum((1, 2))
    return matrix


def means(confusion):
    """{"mIoU", "FPR", "FNR"}: means over the classes that the truth has; "area" of the foreground.

    The classes are the same at every threshold. Area: predicted over true pixels. None where
    a value is undefined.
    """
    occurs = confusion.sum(1) > 0                               # (C + 1,)
    scores = metrics(confusion)
    values = {"mIoU": scores["IoU"][occurs].mean(), "FPR": scores["FPR"][occurs].mean(),
              "FNR": scores["FNR"][occurs].mean(),
              "area": confusion[:, 1:].sum() / confusion[1:].sum()}
    return {key: value.item() if value.isfinite() else None for key, value in values.items()}


def summary(confusion, classes, **facts):
    """An entry of report.json: the facts given, the means, and the scores per class."""
    scores = metrics(confusion)
    names = ["background", *classes]
    per_class = {}
    for c, name in enumerate(names):
        if not scores["IoU"][c].isnan():
            per_class[name] = {key: score[c].item() for key, score in scores.items()}
    occurring = [name for name, pixels in zip(names, confusion.sum(1)) if pixels > 0]
    return {**facts, **means(confusion), "classes": per_class, "truth": occurring}


def show(entry):
    """Print an entry of report.json as a table."""
    print(f"\n{entry['what']}: {entry['where']}, threshold {entry['threshold']}")
    print(f"  {'':16}    IoU    FPR    FNR")
    for name, scores in entry["classes"].items():
        print(f"  {name:16} {scores['IoU']:6.3f} {scores['FPR']:6.3f} {scores['FNR']:6.3f}")
    if entry["mIoU"] is None or entry["area"] is None:          # images without any object
        return
    print(f"  {'mean':16} {entry['mIoU']:6.3f} {entry['FPR']:6.3f} {entry['FNR']:6.3f}   "
          f"foreground {entry['area']:.2f} x the true area")


def check_truth(counts, truth):
    """InputError if the true masks, {id: path}, have no foreground.

    counts: (C + 1, ...) pixels by true class.
    """
    if counts[1:].sum() == 0:
        folder = next(iter(truth.values())).parent
        raise usage.InputError(
            f"{folder}: the true masks have no pixel of any class, only 0 (background) and 255 "
            "(void); write class numbers, 1 for the first class")


def check_names(entry, truth, data, split):
    """Warn of classes that the images' labels name but no true mask contains."""
    named = {label for name in truth for label in data[split][name][1] or ()}
    lacking = [name for name in data["classes"] if name in named and name not in entry["truth"]]
    if lacking:
        print(f"warning: labels name {', '.join(lacking)}, but the true masks in "
              f"{next(iter(truth.values())).parent} have no pixel of that class; are their values "
              "the classes' numbers?")


def check_turns(images):
    """Warn of photographs that are stored turned, given by their paths."""
    turned = 0
    for path in filter(Path.is_file, images):
        with usage.reading(path, "cannot be read as an image"), Image.open(path) as image:
            turned += usage.orientation(image) in usage.TURNS
    if turned:
        print(f"warning: {turned} photographs have an EXIF orientation; their true masks must be "
              "drawn on the upright photograph, as an image viewer shows it")


def compare(predictions, truth, num_classes):
    """`count_levels` of label maps, all at level 255. predictions, truth: {id: path}."""
    counts = 0
    for (name, path), _ in usage.counted(predictions.items(), len(predictions)):
        true = usage.read_mask(truth[name], None, num_classes)
        labels = usage.read_mask(path, true.shape, num_classes)
        if (labels == usage.VOID).any():
            raise usage.InputError(f"{path}: contains void (255), which a prediction must not; to "
                                   "measure a run's pseudo masks, pass --run")
        counts += count_levels(true, labels, torch.full_like(labels, 255), num_classes)
    return counts


def measure_run(run, root, with_sweep):
    """Entries of report.json for what is found in a run folder."""
    trained, data = usage.read_run(run)
    root = root or Path(data["root"])
    entries, seeds = [], None
    for name, split in (("train", "train"), ("val", "val"), ("segmentation", "val")):
        folder = run / name
        if not folder.is_dir():
            continue
        kinds = {"classifier": dict, "refine": bool}
        if name != "segmentation":
            kinds["threshold"] = (int, float)
        remedy = f"remove {folder} and run its stage again"
        made_with = usage.read_json(folder / "settings.json", kinds, remedy)
        if name == "train":
            seeds = made_with
        if made_with["classifier"] != trained:
            print(f"{folder}: made with a different classifier, so not measured; {remedy}")
            continue
        if name == "segmentation" and seeds and made_with.get("seeds") not in (None, seeds):
            print(f"{folder}: made from other seeds, so not measured; run train_seg.py again")
            continue
        truth = find_truth(data, split, root)
        where = f"{folder}, {len(truth)} of {len(data[split])} images of {split} with a mask"
        if not truth:
            print(f"{where}: not measured")
            continue
        if name == "segmentation" and made_with.get("seeds") is None:
            where += ", learnt from --pseudo-masks"
        if name == "segmentation":
            entries.append(measure_segmentation(folder, truth, data, where, made_with))
        else:
            where += ", given labels" if split == "train" else ", predicted labels"
            entries += measure_seeds(folder, truth, data, where, made_with, with_sweep)
        check_names(entries[-1], truth, data, split)
    if not entries:
        raise usage.InputError(f"{run}: nothing to measure; run make_seeds.py for it, add true "
                               "masks, or check --run and --data")
    return entries


def measure_segmentation(folder, truth, data, where, made_with):
    """The entry for the label maps that stage 3 predicted."""
    classes = data["classes"]
    predictions = {name: folder / f"{name}.png" for name in truth}
    counts = compare(predictions, truth, len(classes))
    check_truth(counts, truth)
    how = "none (argmax, refined)" if made_with["refine"] else "none (argmax)"
    return summary(
        at_threshold(counts, 0), classes, what="segmentation", where=where, threshold=how)


def measure_seeds(folder, truth, data, where, made_with, with_sweep):
    """Entries for the seeds and pseudo masks of stage 2, at its threshold and at others."""
    classes, threshold = data["classes"], made_with["threshold"]
    counts = count_maps(folder, truth, len(classes))
    check_truth(sum(counts["seeds"]), truth)
    entries = []
    for what, halves in counts.items():
        entries.append(summary(
            at_threshold(sum(halves), threshold), classes, what=what, where=where,
            threshold=threshold))
    if with_sweep:
        for what, halves in counts.items():
            entries += sweep(what, halves, classes, where)
    return entries


def count_maps(folder, truth, num_classes):
    """{"seeds", "pseudo masks"}: `count_levels` of every second image, and of the others.

    Void pixels of a pseudo mask count as the label they would otherwise have.
    """
    shape = (num_classes + 1, num_classes + 1, 256)
    counts = {what: [torch.zeros(shape, dtype=torch.int64) for _ in range(2)]
              for what in ("seeds", "pseudo masks")}
    for (number, name), _ in usage.counted(enumerate(truth), len(truth)):
        true = usage.read_mask(truth[name], None, num_classes)
        classes, *both = usage.load_maps(folder / f"maps/{name}.npz", num_classes)
        if both[0].shape[1:] != usage.map_size(true.shape):
            raise usage.InputError(f"{truth[name]}: is {true.shape[1]}x{true.shape[0]}, but its "
                                   "image has a different size; make both the same size")
        for what, maps in zip(counts, both):
            labels = usage.label_map(maps[None], 0, classes)[0]     # (h, w), 0 where all maps are 0
            levels = F.pad(maps, (0, 0, 0, 0, 1, 0)).amax(0)        # (1 + K, h, w) -> (h, w)
            labels, levels = (usage.resized_labels(x, true.shape) for x in (labels, levels))
            counts[what][number % 2] += count_levels(true, labels, levels, num_classes)
    return counts


def sweep(what, halves, classes, where):
    """Entries at the maps' best thresholds: one chosen on one half for the other, and an oracle's.

    what: "seeds", or "pseudo masks", whose maps were refined for another threshold. The half to
    choose on is every second image, the first included. The oracle chooses on the very masks that
    it is measured on.
    """
    first, second = halves
    both = first + second
    chosen = best_threshold(first)
    best = best_threshold(both)
    curve = [means(at_threshold(both, step)) for step in THRESHOLDS]
    curves = {f"{key} at 0.00, 0.01 ... 1.00": [point[key] for point in curve]
              for key in ("mIoU", "area")}
    return [
        summary(at_threshold(second, chosen), classes, what=f"{what}, own threshold",
                where=f"{where}, every second one",
                threshold=f"{chosen:.2f} (chosen on the others)"),
        summary(at_threshold(both, best), classes, what=f"{what}, oracle", where=where,
                threshold=f"{best:.2f} (the best of 101, chosen on these very masks)", **curves),
    ]


def best_threshold(counts):
    """The threshold of THRESHOLDS with the highest mIoU."""
    scores = [means(at_threshold(counts, step))["mIoU"] or 0.0 for step in THRESHOLDS]
    return THRESHOLDS[int(np.argmax(scores))].item()


def compare_folders(args):
    """Entries of a report for two folders of label PNGs."""
    if args.pred.resolve() == args.truth.resolve():
        raise usage.InputError(f"{args.pred}: --pred and --truth are the same folder")
    classes = usage.read_classes(args.classes)
    predictions = usage.image_files(args.pred, (".png",))
    truth = usage.image_files(args.truth, (".png",))
    missing = [name for name in predictions if name not in truth]
    if missing:
        raise usage.InputError(f"{args.truth}/{missing[0]}.png: missing; add it, or remove it from "
                               f"{args.pred}")
    counts = compare(predictions, truth, len(classes))
    check_truth(counts, truth)
    where = f"{args.pred}, all {len(predictions)} images, {len(truth)} in {args.truth}"
    return [summary(at_threshold(counts, 0), classes, what="label maps", where=where,
                    threshold="none (label maps)")]


def main():
    parser = usage.CommandLine(__doc__)
    add = parser.add_argument_group("a run").add_argument
    add("--run", type=Path,
        help="a run folder (default runs/toy-resnet50); report.json is written into it")
    add("--data", type=Path, help="where the data lies now, if it has moved since stage 1")
    add("--sweep", action="store_true",
        help="also measure seeds and pseudo masks at their best thresholds: one chosen on every "
             "second image and measured on the others, and one chosen on all (an oracle)")
    add = parser.add_argument_group("two folders").add_argument
    add("--pred", type=Path, help="a folder of label PNGs to compare with --truth")
    add("--truth", type=Path,
        help="a folder of label PNGs: 0 background, 1 to C the classes, 255 void")
    add("--classes", type=Path,
        help="a file with the class names, one per line (default: VOC's 20)")
    args = parser.parse_args()
    of_folders = args.pred or args.truth or args.classes
    if of_folders and (not (args.pred and args.truth) or args.run or args.data or args.sweep):
        raise usage.InputError("--pred and --truth go together, without --run, --data or --sweep; "
                               "--classes goes with them only")
    if of_folders:
        entries = compare_folders(args)
    else:
        run = args.run or Path("runs/toy-resnet50")
        entries = measure_run(run, args.data, args.sweep)
    for entry in entries:
        show(entry)
    if not of_folders:
        usage.write_json(run / "report.json", entries)


# ==== The true masks ==============================================================================


def find_truth(data, split, root):
    """{id: path} of the true masks of a split; COCO's are drawn if they are not there."""
    outlines = data["outlines"][split]
    if outlines:
        folder = root / data["masks"][split]
        with usage.reading(root / outlines, "fetch COCO's annotations again, or correct --data"):
            drawn_with = {"classes": data["classes"], "bytes": (root / outlines).stat().st_size}
        before = {}
        if folder.is_dir():
            remedy = f"move {folder} away, or to SegmentationClass if the masks are yours"
            before = usage.read_json(folder / "settings.json", {}, remedy)
        if before != drawn_with:
            with usage.whole_folder(folder, drawn_with) as partial:
                draw_coco_masks(root / outlines, root / f"{split}2014", data["classes"], partial)
    truth = usage.true_masks(data, split, root)
    if not outlines:
        check_turns(root / data[split][name][0] for name in truth)
    return truth


def draw_coco_masks(path, images, classes, folder):
    """Draw true masks from COCO's outlines: small objects over large ones, crowds void.

    path: of the annotations; images: the folder of the photographs, which may be stored turned. A
    mask that has the size of the stored photograph is turned upright with it.
    """
    print(f"{path}: drawing the true masks (only once)", flush=True)
    with usage.reading(path, "not COCO's instances: fetch it again", any_shape=True):
        table = json.loads(path.read_bytes())
        labels = {category["id"]: classes.index(usage.one_form(category["name"])) + 1
                  for category in table["categories"]}
        objects = {image["id"]: [] for image in table["images"]}
        for entry in table["annotations"]:
            objects[entry["image_id"]].append(entry)
    files = usage.image_files(images)
    for image, _ in usage.counted(table["images"], len(table["images"])):
        name = usage.one_form(Path(image["file_name"]).stem)
        drawn = folder / f"{name}.png"
        if usage.is_there(drawn):
            continue
        remedy = f"an outline of {name} cannot be drawn: fetch the file again"
        with usage.reading(path, remedy, any_shape=True):
            mask = np.zeros((image["height"], image["width"]), np.uint8)
            large_first = sorted(
                objects[image["id"]], key=lambda entry: (not entry["iscrowd"], -entry["area"]))
            for entry in large_first:
                value = usage.VOID if entry["iscrowd"] else labels[entry["category_id"]]
                mask[draw_outline(entry["segmentation"], *mask.shape)] = value
        if name in files:
            mask = turned_like(mask, files[name])
        usage.save_mask(drawn, mask)


def turned_like(mask, path):
    """A mask (H, W), turned upright like its photograph if it has the stored photograph's size."""
    with usage.reading(path, "cannot be read as an image"), Image.open(path) as photograph:
        turn = usage.TURNS.get(usage.orientation(photograph))
        if turn is None or photograph.size != mask.shape[::-1]:
            return mask
        return np.array(Image.fromarray(mask).transpose(turn))


def draw_outline(outline, height, width):
    """An object of COCO's as (H, W) bool.

    outline: a list of polygons [x, y, x, y, ...], or runs {"counts": [...], "size": [H, W]}, which
    are lengths down the columns, first of background, then of the object, and so on. A polygon of
    fewer than three points covers nothing. Format: COCO's maskApi.
    """
    if isinstance(outline, list):
        fine = 4        # drawn larger, as Pillow's polygons include their edges
        canvas = Image.new("L", (fine * width, fine * height))
        for polygon in outline:
            points = [(fine * x, fine * y) for x, y in zip(polygon[::2], polygon[1::2])]
            if len(points) >= 3:
                ImageDraw.Draw(canvas).polygon(points, fill=255)
        return np.array(canvas.reduce(fine)) > 150
    runs = outline["counts"]
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return inside.reshape(width, height).T


if __name__ == "__main__":
    with usage.one_line_errors("run the same command again"):
        main()
