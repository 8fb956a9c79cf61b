"""Stage 2: seed areas from the classifier of stage 1, and the pseudo masks that stage 3 learns from.

    python make_seeds.py --run runs/toy-resnet50                    the training images, by their image-level labels
    python make_seeds.py --run runs/toy-resnet50 --split val        another split, by predicted labels
    python make_seeds.py --run runs/toy-resnet50 --images FOLDER    anybody's photographs, by predicted labels

Reads classifier.pt and .json. Writes into the run folder, or for the last two into runs/.../val and runs/.../images-FOLDER:
    seeds/<id>.png            the paper's seed areas: label maps in VOC's palette
    pseudo_masks/<id>.png     the same after refinement; what is uncertain is void (255)
    maps/<id>.npz             the seed maps of the present classes behind both, which eval.py reads
    seeds.png                 a sheet of photograph | heat map | seed | pseudo mask | truth, where there is one
    labels.json               the predicted labels, where they are predicted
    seeds.json, seeds.jsonl   the settings and the log
True masks are opened for the last column of that sheet alone. Started again, it continues where it stopped.
Next: train_seg.py, or eval.py.
"""

import argparse
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader

import usage

# The defaults, per kind of network and of initial weights, all OURS. Scale 1 is the photograph with its longer side at the
# size of training. CNNs, whose training crops enlarge the photograph, gain from finer maps (IRN has 0.5 to 2), Transformers
# stay near the grid that their position embedding knows. The threshold is a round number in the middle, and one
# chosen on every second VOC photograph for pretrained Transformers (EVIDENCE.md); eval.py --sweep tells others. Patch
# affinity wants attention that knows objects: trained from scratch on the toy, it floods the scene.
RECIPES = {
    ("cnn", "scratch"): dict(scales=[1.0, 1.5, 2.0], threshold=0.4, affinity=False),
    ("transformer", "scratch"): dict(scales=[0.75, 1.0, 1.25], threshold=0.4, affinity=False),
    ("cnn", "pretrained"): dict(scales=[1.0, 1.5, 2.0], threshold=0.4, affinity=False),
    ("transformer", "pretrained"): dict(scales=[0.75, 1.0, 1.25], threshold=0.5, affinity=True),
}
UNCERTAIN = 0.08                    # OURS: refined maps this near to the threshold become void


class Readable(usage.Photographs):
    """Photographs, with None in the place of a file that cannot be read."""

    def __getitem__(self, index):
        try:
            return super().__getitem__(index)
        except usage.InputError:
            return None, self.targets[index]


def open_photographs(folder, classes):
    """Anybody's photographs, with the classes of a trained run, as far as they are needed of a DataFolder."""
    images = usage.image_files(folder)
    return SimpleNamespace(root=folder, classes=classes, images=images, masks=folder / "no true masks")


def results_of(folder, name):
    """The files of one image's results; all there and not empty means done."""
    return folder / f"seeds/{name}.png", folder / f"pseudo_masks/{name}.png", folder / f"maps/{name}.npz"


def write_results(folder, name, present, maps, refined, threshold, uncertain=UNCERTAIN):
    """Write what is known of one image.

    present (K,): the numbers of its classes; maps, refined (K, H, W) uint8: their seed maps * 255; in the pseudo mask
    refined maps within `uncertain` of the threshold are void.
    """
    seed, mask = (usage.label_map(levels[None] / 255, threshold, present)[0] for levels in (maps, refined))     # (H, W)
    if len(present):
        mask[(refined.amax(0) / 255 - threshold).abs() < uncertain] = usage.VOID
    with usage.written(folder / f"maps/{name}.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, classes=present.numpy(), maps=maps.numpy(), refined=refined.numpy())
    for path, labels in zip(results_of(folder, name), (seed, mask)):
        usage.save_mask(path, labels)


@torch.no_grad()
def main():
    number = usage.number
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     epilog="Flags without a default here take it from the table RECIPES in this file.")
    parser.error = usage.fail
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/toy-resnet50"), help="folder of stage 1 (default runs/toy-resnet50)")
    add("--data", help="where the data lies now, if it has moved since stage 1")
    add("--split", help="another split than that of training, its labels predicted")
    add("--images", type=Path, help="a folder of photographs, their labels predicted")
    add("--class-threshold", type=number(0, 1),
        help="a class of this probability is predicted (default: the one that gives the training images as many classes as "
             "they have)")
    add("--threshold", type=number(0, 1), help="a pixel above it is foreground (default 0.4; pretrained Transformers 0.5)")
    add("--scales", type=number(0.05, 8), nargs="+", help="default: 1 1.5 2 for CNNs, 0.75 1 1.25 for Transformers")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="add the mirror image (default yes)")
    add("--affinity", action=argparse.BooleanOptionalAction,
        help="Transformers: spread the maps by the attention among patches (default: if pretrained)")
    add("--refine", action=argparse.BooleanOptionalAction, default=True,
        help="let pseudo masks follow the edges of the image (default yes); without it they are the seeds")
    add("--workers", type=number(0, usage.CORES, int), default=usage.WORKERS, help=f"load images (default {usage.WORKERS})")
    add("--device", default="auto", help="cuda, cpu, ... (default: CUDA where there is one)")
    args = parser.parse_args()
    if args.images and args.split:
        raise usage.InputError("pass --images or --split, not both")
    device = usage.start_processes(args.device)

    # ---- the classifier and the images
    network, trained = usage.load_classifier(args.run)
    network = network.to(device, memory_format=torch.channels_last).eval()
    usage.take_defaults(args, RECIPES, trained["backbone"], trained["weights"])
    if args.affinity and trained["backbone"] in usage.CNNS:
        raise usage.InputError(f"--affinity: {trained['backbone']} has no attention; leave it out")
    split, folder = trained["split"], args.run
    if args.images:
        data, split = open_photographs(args.images, trained["classes"]), "all"
        ids, folder = list(data.images), args.run / f"images-{args.images.resolve().name}"
    else:
        if args.split and args.split != split:
            split, folder = args.split, args.run / args.split
        data = usage.open_run_data(args.run, trained, args.data, [folder / "seeds", folder / "pseudo_masks"])
        if split not in data.splits:
            raise usage.InputError(f"--split {split}: no such list; there are {', '.join(sorted(data.splits))}")
        ids = data.ids(split)
    predicted = folder != args.run
    if args.class_threshold is None:
        args.class_threshold = trained["class_threshold"]
    labels = torch.ones(len(ids), len(data.classes)) if predicted else data.labels(ids)
    photographs = data.images.values() if args.images else data.sizes(ids)
    settings = {"classifier": trained["classifier"], "threshold": args.threshold, "scales": args.scales, "flip": args.flip,
                "affinity": args.affinity, "refine": args.refine, "split": split, "data": str(data.root.resolve()),
                "classes": data.classes, "input_files": usage.fingerprint(ids, labels, *photographs),
                "class_threshold": args.class_threshold if predicted else None}
    results = [folder / name for name in ("seeds", "pseudo_masks", "maps")]
    usage.check_results(folder / "seeds.json", settings, results)
    mine = range(usage.RANK, len(ids), usage.WORLD)
    todo = [k for k in mine if not all(map(usage.is_there, results_of(folder, ids[k])))]
    print(f"{data.root}: seeds of {len(ids)} images of {split}, {'predicted' if predicted else 'given'} labels, threshold "
          f"{args.threshold} (fixed), into {folder / 'seeds'}; {len(mine) - len(todo)} are there")

    # ---- seeds
    log = usage.Log(folder / "seeds.jsonl", len(mine), len(mine) - len(todo), results)
    usage.write_json(folder / "seeds.json", settings)
    images = (Readable if args.images else usage.Photographs)(data, [ids[k] for k in todo], labels[todo])
    loader = DataLoader(images, batch_size=None, num_workers=args.workers)
    for name, (image, has) in zip(images.ids, loader):
        if image is None:
            print(log.line(1), end="", flush=True)
            continue
        image, size = image[None].to(device), image.shape[-2:]                      # (1, 3, H, W)
        if predicted:
            square = network.fitting_size(2 * (trained["size"],))                   # as the class threshold was chosen
            view = F.interpolate(image, square, mode="bilinear", antialias=True)
            s, alpha = usage.activate(network, view, trained["temperature"], trained["attention"])
            has = usage.class_scores(s, alpha)[0].sigmoid().cpu() > args.class_threshold        # (C,)
        present = has.nonzero()[:, 0]                                               # (K,) the classes of the image
        maps = refined = torch.zeros(0, *size, dtype=torch.uint8)
        if len(present):
            views = usage.multi_scale_activations(network, image, trained["size"], args.scales, args.flip, args.affinity)
            exact = usage.seed_maps([s[:, present.to(device)] for s in views], size)            # (1, K, H, W)
            refined = usage.refine_maps(image, exact, args.threshold) if args.refine else exact
            maps, refined = ((255 * x[0]).round().byte().cpu() for x in (exact, refined))       # (K, H, W), in 8 bits
        write_results(folder, name, present, maps, refined, args.threshold, UNCERTAIN * args.refine)
        print(log.line(1), end="", flush=True)

    # ---- what there is to see
    usage.wait_for_all()
    if usage.RANK > 0:
        return
    made = [name for name in ids if all(map(usage.is_there, results_of(folder, name)))]
    print()
    if predicted:
        found = {name: [data.classes[c] for c in usage.load_maps(folder / f"maps/{name}.npz", len(data.classes))[0]]
                 for name in made}
        usage.write_json(folder / "labels.json", found)
        print(f"{sum(map(len, found.values()))} classes found; {sum(not names for names in found.values())} of {len(made)} "
              "images have none")
    if args.images:
        used = {data.images[name].name for name in made}
        others = sorted(path.name + "/" * path.is_dir() for path in args.images.iterdir() if path.name not in used)
        if others:
            print(f"left out, as no photographs that can be read: {', '.join(others)}")
    if made:
        save_contact_sheet(folder, data, made)
        print(f"{folder / 'seeds.png'} shows some")
    run = shlex.quote(str(folder))
    following = [] if predicted else [f"python train_seg.py --run {run}"]
    if not args.images and data.has_masks(ids):
        following.append(f"python eval.py --run {run}")
    if following:
        print(f"next: {', or '.join(following)}")


# ==== The contact sheet ===============================================================================================

def save_contact_sheet(folder, data, ids, width=180, height=120):
    """Write seeds.png of up to ten images: photograph | heat map of its strongest class | label maps | truth, if there is.

    folder: of seeds/, pseudo_masks/ and maps/. Tiles keep the photograph's shape.
    A label map shows the names of its classes in their colours; one that is missing or broken leaves its place empty.
    """
    ids = [ids[k] for k in np.linspace(0, len(ids) - 1, min(10, len(ids))).round().astype(int)]
    columns = {"seeds": folder / "seeds", "pseudo masks": folder / "pseudo_masks"}
    if any((data.masks / f"{name}.png").is_file() for name in ids):
        columns["truth"] = data.masks
    headings = ["photograph", "heat map", *columns]
    sheet = Image.new("RGB", (len(headings) * (width + 4), 20 + len(ids) * (height + 4)), "white")
    palette, font, pen = usage.VOC_PALETTE, ImageFont.load_default(11), ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        pen.text((column * (width + 4) + 3, 3), heading, "black", font)
    for line, name in enumerate(ids):
        photo = np.asarray(usage.read_image(data.images[name]), dtype=np.float32)       # (H, W, 3)
        classes, levels, _ = usage.load_maps(folder / f"maps/{name}.npz", len(data.classes))
        tiles = [(photo, []), (0.35 * photo, [("no class", "black")])]                  # pixels, and (text, colour) on them
        if len(classes):
            strongest = levels.sum((1, 2)).argmax()
            heat = 3 * levels[strongest].numpy()[..., None] / 255 - np.arange(3)            # from black over red to white
            grey = photo.mean(2, keepdims=True)
            tiles[1] = 166 * heat.clip(0, 1) + 0.35 * grey, [(data.classes[classes[strongest]], "black")]
        for masks in columns.values():
            try:
                mask = usage.read_mask(masks / f"{name}.png", photo.shape[:2], len(data.classes)).numpy()
            except usage.InputError:
                tiles.append((np.full_like(photo, 255), []))
                continue
            words = [(data.classes[c - 1], tuple(palette[c].tolist())) for c in np.unique(mask) if 0 < c < usage.VOID]
            tiles.append((np.where(mask[..., None] > 0, 0.65 * palette[mask] + 0.35 * photo, photo), words))
        for column, (pixels, words) in enumerate(tiles):
            corner = column * (width + 4), 20 + line * (height + 4)
            sheet.paste(ImageOps.contain(Image.fromarray(pixels.astype(np.uint8)), (width, height)), corner)
            for k, (text, colour) in enumerate(words):
                pen.text((corner[0] + 3, corner[1] + 2 + 12 * k), text, colour, font, stroke_width=2, stroke_fill="white")
    with usage.written(folder / "seeds.png") as temporary:
        sheet.save(temporary, "PNG")


if __name__ == "__main__":
    with usage.one_line_errors("run the same command again: it continues where it stopped"):
        main()
