"""Stage 2: seed areas from the classifier of stage 1, and pseudo masks for stage 3 to learn from.

    python make_seeds.py --run runs/toy-resnet50                    training images, given labels
    python make_seeds.py --run runs/toy-resnet50 --split val        val images, predicted labels
    python make_seeds.py --run runs/toy-resnet50 --images FOLDER    photographs, predicted labels

Writes a folder into the run, train/, val/ or images-FOLDER/, with
    seeds/<id>.png            the paper's seed areas: label maps in VOC's palette
    pseudo_masks/<id>.png     the same after refinement; what is uncertain is void (255)
    maps/<id>.npz             the maps from which both were made, one for each present class
    seeds.png                 photograph | heat map | seed | pseudo mask | truth, of some images
    labels.json               the predicted classes (with --split val or --images only)
    settings.json             the settings that made this folder
While the folder is being made, its name ends in .partial. If interrupted, run
the same command again: it continues. True masks are read only for the last column of seeds.png.
Next: train_seg.py, or eval.py.
"""

import argparse
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import usage

# The defaults, by kind of network and of initial weights, all OURS. At scale 1 the photograph's
# longer side is the size of training. CNNs, whose training crops enlarge the photograph, gain from
# finer maps (IRN has 0.5 to 2); Transformers stay near the grid that their position embedding
# knows. The threshold 0.4 is a round number in the middle; 0.5 was chosen, on the toy (CNNs from
# scratch) and on every second VOC photograph (pretrained Transformers), see EVIDENCE.md; eval.py
# --sweep shows how others do. Patch affinity needs attention that has learnt about objects; trained
# on the toy alone, it floods the scene.
RECIPES = {
    ("cnn", "scratch"): dict(threshold=0.5, scales=[1.0, 1.5, 2.0], affinity=False),
    ("transformer", "scratch"): dict(threshold=0.4, scales=[0.75, 1.0, 1.25], affinity=False),
    ("cnn", "pretrained"): dict(threshold=0.4, scales=[1.0, 1.5, 2.0], affinity=False),
    ("transformer", "pretrained"): dict(threshold=0.5, scales=[0.75, 1.0, 1.25], affinity=True),
}
UNCERTAIN = 0.08        # OURS: refined maps this near to the threshold become void


def parse_arguments():
    number = usage.number
    parser = usage.CommandLine(__doc__, RECIPES)

    add = parser.add_argument_group("run").add_argument
    add("--run", type=Path, default=Path("runs/toy-resnet50"),
        help="folder of stage 1 (default runs/toy-resnet50)")
    add("--data", type=Path, help="where the data lies now, if it has moved since stage 1")
    add("--split", choices=("train", "val"),
        help="train, using its labels (default), or val, using predicted labels")
    add("--images", type=Path, help="a folder of photographs instead, using predicted labels")

    add = parser.add_argument_group("seeds").add_argument
    add("--class-threshold", type=number(0, 1),
        help="probability above which a class is predicted (default: the value at which the "
             "training images get as many classes as their labels contain)")
    add("--threshold", type=number(0, 1), help="value of a map above which a pixel is foreground")
    add("--scales", type=number(0.05, 8), nargs="+", help="scales of the photograph to sum over")
    add("--flip", action=argparse.BooleanOptionalAction, default=True,
        help="add the mirror image (default)")
    add("--affinity", action=argparse.BooleanOptionalAction,
        help="Transformers: spread the maps by the attention among patches")
    add("--refine", action=argparse.BooleanOptionalAction, default=True,
        help="refine pseudo masks along edges (default); with --no-refine they equal the seeds")

    add = parser.add_argument_group("machine").add_argument
    add("--workers", type=number(0, usage.CORES, int), default=usage.WORKERS,
        help=f"processes that load images (default {usage.WORKERS})")
    add("--device", default="auto", help="cuda, cpu, ... (default: CUDA if available)")

    args = parser.parse_args()
    if args.images and args.split:
        raise usage.InputError("pass --images or --split, not both")
    args.split = args.split or "train"
    return args


def predict_classes(network, image, settings, args):
    """Which classes an image (1, 3, H, W) has, according to the classifier: (C,) bool."""
    square = network.fitting_size((settings["size"], settings["size"]))     # as in stage 1
    view = F.interpolate(image, square, mode="bilinear", antialias=True)
    s, alpha = usage.activations_and_alpha(
        network, view, settings["temperature"], settings["attention"])
    scores = usage.class_scores(s, alpha)[0].double()
    if args.class_threshold is None:
        return scores > settings["score_threshold"]
    return scores.sigmoid() > args.class_threshold


def seed_of(network, image, present, longer, args):
    """The seed maps of an image's classes, and the same refined.

    image (1, 3, H, W); present (K,): the classes it has; longer: its longer side at scale 1
    -> two (1, K, H, W) in [0, 1].
    """
    views = usage.multi_scale_activations(
        network, image, longer, args.scales, args.flip, args.affinity)
    maps = usage.seed_maps([s[:, present] for s in views], image.shape[2:])
    if not args.refine:
        return maps, maps
    return maps, usage.refine_maps(image, maps, args.threshold)


def results_of(folder, name):
    """The files of one image's results: seed, pseudo mask, maps."""
    return (folder / f"seeds/{name}.png", folder / f"pseudo_masks/{name}.png",
            folder / f"maps/{name}.npz")


def write_results(folder, name, size, present, maps, refined, threshold, uncertain=UNCERTAIN):
    """Write all results of one image.

    size (H, W) of the photograph; present (K,): its classes; maps, refined (K, h, w) uint8, of
    map_size: seed maps * 255. In the pseudo mask, refined maps within `uncertain` of the threshold
    are void. Photographs larger than the maps get their label maps enlarged.
    """
    seed, mask = (usage.label_map(levels[None] / 255, threshold, present)[0]
                  for levels in (maps, refined))                            # (h, w)
    if len(present):
        mask[(refined.amax(0) / 255 - threshold).abs() < uncertain] = usage.VOID
    seed_path, mask_path, maps_path = results_of(folder, name)
    usage.save_mask(seed_path, usage.resized_labels(seed, size))
    usage.save_mask(mask_path, usage.resized_labels(mask, size))
    with usage.written(maps_path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, classes=present.numpy(), maps=maps.numpy(), refined=refined.numpy())


@torch.no_grad()
def main():
    args = parse_arguments()
    device = usage.start_processes(args.device)

    # ---- the classifier and the images
    settings, data = usage.read_run(args.run)
    classes = data["classes"]
    network = usage.load_classifier(args.run, settings, len(classes))
    network = network.to(device, memory_format=torch.channels_last).eval()
    usage.take_defaults(args, RECIPES, settings["backbone"], settings["weights"])
    if args.affinity and settings["backbone"] in usage.CNNS:
        raise usage.InputError(f"--affinity: {settings['backbone']} has no attention; leave it out")
    if args.images:
        files = usage.image_files(args.images)
        ids, images, labels = list(files), list(files.values()), None
        truth, target = {}, args.run / f"images-{args.images.resolve().name}"
    else:
        ids, images, labels = usage.read_split(data, args.split, settings, args.data)
        truth, target = usage.true_masks(data, args.split, args.data), args.run / args.split
    predicted = args.images is not None or args.split != "train"
    made_with = {
        "threshold": args.threshold, "scales": args.scales, "flip": args.flip,
        "affinity": args.affinity, "refine": args.refine,
        "class_threshold": args.class_threshold if predicted else None,
        "images": usage.fingerprint(ids, usage.sizes_of(images)), "classifier": settings}
    if args.images:
        made_with["folder"] = str(args.images.resolve())
        before = target / "settings.json"
        if before.is_file() and usage.read_json(before, {}, "remove it").get("folder") != made_with[
                "folder"]:
            raise usage.InputError(f"{target}: holds the seeds of a different folder with this "
                                   "name; move it away, or rename one of the folders")
    usage.lock(args.run)
    with usage.whole_folder(target, made_with, ["seeds", "pseudo_masks", "maps"]) as folder:
        mine = range(usage.RANK, len(ids), usage.WORLD)
        todo = [k for k in mine if not all(map(usage.is_there, results_of(folder, ids[k])))]
        source = "predicted" if predicted else "given"
        print(f"seeds of {len(ids)} images from {source} labels at threshold {args.threshold} into "
              f"{target}; {len(mine) - len(todo)} are already done")

        # ---- seeds
        photographs = usage.WholePhotographs([images[k] for k in todo], skip=bool(args.images))
        loader = photographs.loader(args.workers)
        with ThreadPoolExecutor(1) as writer:                   # compresses while the network runs
            writing = None
            for (k, (image, size)), _ in usage.counted(zip(todo, loader), len(todo)):
                if image is None:
                    continue
                image = usage.TO_TENSOR(image)[None].to(device)             # (1, 3, h, w)
                image = usage.NORMALISE(image)
                if predicted:
                    has = predict_classes(network, image, settings, args)   # (C,)
                else:
                    has = labels[k]
                present = has.nonzero()[:, 0].to(device)                    # (K,)
                maps = refined = torch.zeros(1, 0, *image.shape[2:])
                if len(present):
                    maps, refined = seed_of(network, image, present, settings["size"], args)
                maps, refined = (                                           # (K, h, w), 8 bits
                    (255 * levels[0]).round().byte().cpu() for levels in (maps, refined))
                if writing:
                    writing.result()                            # an error of the last image
                writing = writer.submit(
                    write_results, folder, ids[k], size, present.cpu(), maps, refined,
                    args.threshold, UNCERTAIN if args.refine else 0.0)
            if writing:
                writing.result()

        # ---- the contact sheet, and what comes next
        usage.wait_for_all()
        made = {name: path for name, path in zip(ids, images)
                if (folder / f"maps/{name}.npz").is_file()}
        if not made:
            raise usage.InputError(f"{args.images}: no image in it can be read")
        if usage.RANK == 0:
            if predicted:
                write_labels(folder, classes, made)
            save_contact_sheet(folder, classes, made, truth)
    if args.images:
        used = {path.name for path in made.values()}
        skipped = [path.name for path in sorted(args.images.iterdir()) if path.name not in used]
        if skipped:
            print(f"skipped, not readable as images: {', '.join(skipped)}")
    print(f"{target / 'seeds.png'} shows examples")
    run = shlex.quote(str(args.run))
    following = [] if predicted else [f"python train_seg.py --run {run}"]
    if truth or (not args.images and data["outlines"][args.split]):
        following.append(f"python eval.py --run {run}")
    if following:
        print(f"next: {', or '.join(following)}")


def write_labels(folder, classes, ids):
    """Write labels.json: {id: names of the predicted classes}, and say how many there are."""
    found = {}
    for name in ids:
        present, _, _ = usage.load_maps(folder / f"maps/{name}.npz", len(classes))
        found[name] = [classes[c] for c in present]
    usage.write_json(folder / "labels.json", found)
    count = sum(len(names) for names in found.values())
    without = sum(not names for names in found.values())
    print(f"{count} classes predicted; {without} of {len(found)} images have none")


# ==== The contact sheet ===========================================================================


def save_contact_sheet(folder, classes, images, truth, width=180, height=120):
    """Write seeds.png of up to ten images: photograph | heat map | label maps | truth, if any.

    folder: of seeds/, pseudo_masks/ and maps/; images {id: path}; truth {id: path of a mask}. The
    heat map is of the strongest class. Tiles keep the photograph's shape; a label map shows the
    names of its classes in their colours. A mask that is missing or broken leaves its place empty.
    """
    chosen = np.linspace(0, len(images) - 1, min(10, len(images))).round().astype(int)
    ids = [list(images)[k] for k in chosen]
    headings = ["photograph", "heat map", "seeds", "pseudo masks"]
    if any(name in truth for name in ids):
        headings.append("truth")
    size = len(headings) * (width + 4), 20 + len(ids) * (height + 4)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for column, heading in enumerate(headings):
        pen.text((column * (width + 4) + 3, 3), heading, "black", font)
    for row, name in enumerate(ids):
        masks = [folder / f"seeds/{name}.png", folder / f"pseudo_masks/{name}.png"]
        if len(headings) == 5:
            masks.append(truth.get(name, folder / "no true mask"))
        photo = usage.read_image(images[name])
        shrink = min(width / photo.width, height / photo.height)
        photo = photo.resize([max(1, round(shrink * side)) for side in photo.size])
        present, maps, _ = usage.load_maps(folder / f"maps/{name}.npz", len(classes))
        tiles = [(np.asarray(photo), []), heat_tile(photo, present, maps, classes)]
        tiles += [mask_tile(photo, path, classes) for path in masks]
        for column, (pixels, words) in enumerate(tiles):
            x, y = column * (width + 4), 20 + row * (height + 4)
            sheet.paste(Image.fromarray(pixels.astype(np.uint8)), (x, y))
            for k, (text, colour) in enumerate(words):
                place = (x + 3, y + 2 + 12 * k)
                pen.text(place, text, colour, font, stroke_width=2, stroke_fill="white")
    with usage.written(folder / "seeds.png") as temporary:
        sheet.save(temporary, "PNG")


def heat_tile(photo, present, maps, classes):
    """The strongest map over the grey photograph: pixels (H, W, 3), and (text, colour) on them."""
    grey = 0.35 * np.asarray(photo, dtype=np.float32).mean(2, keepdims=True) + np.zeros(3)
    if len(present) == 0:
        return grey, [("no class", "black")]
    strongest = maps.sum((1, 2)).argmax()
    heat = Image.fromarray(maps[strongest].numpy()).resize(photo.size)
    heat = np.asarray(heat)[..., None] / 255
    black_red_white = (3 * heat - np.arange(3)).clip(0, 1)
    return 166 * black_red_white + grey, [(classes[present[strongest]], "black")]


def mask_tile(photo, path, classes):
    """A label map over the photograph: pixels (H, W, 3), and (text, colour) on them."""
    photo = np.asarray(photo)
    try:
        mask = usage.read_mask(path, None, len(classes))
    except usage.InputError:
        return np.full_like(photo, 255), []
    words = [(classes[c - 1], tuple(usage.VOC_PALETTE[c].tolist()))
             for c in np.unique(mask) if 0 < c < usage.VOID]
    mask = usage.resized_labels(mask, photo.shape[:2]).numpy()
    colours = usage.VOC_PALETTE[mask]
    return np.where(mask[..., None] > 0, 0.65 * colours + 0.35 * photo, photo), words


if __name__ == "__main__":
    with usage.one_line_errors("run the same command again: it continues where it stopped"):
        main()
