"""Stage 2: seed areas from the classifier of stage 1, and the pseudo masks that stage 3 learns from.

    python make_seeds.py --run runs/toy-resnet50                    the training images, by their image-level labels
    python make_seeds.py --run runs/toy-resnet50 --split val        another split, by predicted labels
    python make_seeds.py --run runs/toy-resnet50 --images FOLDER    anybody's photographs, by predicted labels

Reads classifier.pt. Writes into the run folder, or for the last two into runs/.../val and runs/.../images-FOLDER:
    seeds/<id>.png            the paper's seed areas: label maps in VOC's palette
    pseudo_masks/<id>.png     the same after refinement; what is uncertain is void (255)
    scores/<id>.npz           the scores of the present classes behind both, which eval.py reads
    seeds.png                 a sheet of photograph | heat map | seed | pseudo mask | truth, where there is one
    labels.json               the predicted labels, where they are predicted
True masks are opened for the last column of that sheet alone. Started again, it continues where it stopped.
Next: train_seg.py, or eval.py.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import usage

# Scale 1 is the photograph with its longer side at the size of training. OURS: CNNs, whose training crops enlarge the
# photograph, gain from finer maps (IRN has 0.5 to 2); Transformers stay near the grid that their position embedding knows.
SCALES = {"cnn": (1.0, 1.5, 2.0), "transformer": (0.75, 1.0, 1.25)}
THRESHOLD = 0.4                     # OURS: a round number in the middle; eval.py --sweep tells what others give
UNCERTAIN = 0.08                    # OURS: refined scores this near to the threshold become void


def write_results(folder, name, present, levels, refined, threshold):
    """Write what is known of one image; the seed comes last: its being there means done.

    present (K,): the numbers of its classes; levels, refined (K, H, W) uint8: their scores * 255, refined may be None.
    """
    arrays = {"classes": present.numpy(), "levels": levels.numpy()}
    if refined is not None:
        arrays["refined"] = refined.numpy()
        mask = usage.label_map(refined[None] / 255, threshold, present)[0]          # (H, W)
        if len(present):
            mask[(refined.amax(0) / 255 - threshold).abs() < UNCERTAIN] = usage.VOID
        usage.save_mask(folder / f"pseudo_masks/{name}.png", mask)
    with usage.written(folder / f"scores/{name}.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    usage.save_mask(folder / f"seeds/{name}.png", usage.label_map(levels[None] / 255, threshold, present)[0])


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/toy-resnet50"), help="folder of stage 1 (default runs/toy-resnet50)")
    add("--data", help="where the data lies now, if it has moved since stage 1")
    add("--split", help="another split than that of training, its labels predicted")
    add("--images", type=Path, help="a folder of photographs, their labels predicted")
    add("--class-threshold", type=float, default=0.5, help="a class of this probability is predicted (default 0.5)")
    add("--threshold", type=float, default=THRESHOLD, help=f"a pixel above it is foreground (default {THRESHOLD})")
    add("--scales", type=float, nargs="+", help="default: 1 1.5 2 for CNNs, 0.75 1 1.25 for Transformers")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="add the mirror image (default yes)")
    add("--refine", action=argparse.BooleanOptionalAction, default=True,
        help="let pseudo masks follow the edges of the image (default yes); without it train_seg.py learns the seeds")
    add("--workers", type=int, default=usage.WORKERS, help=f"processes that load images (default {usage.WORKERS})")
    add("--device", default="auto", help="cuda, cpu, ... (default: CUDA where there is one)")
    args = parser.parse_args()
    if not (0 <= args.threshold <= 1 and 0 <= args.class_threshold <= 1):
        raise usage.InputError("--threshold and --class-threshold take 0 to 1")
    if not all(0 < scale <= 8 for scale in args.scales or ()):
        raise usage.InputError("--scales takes more than 0 and at most 8")
    if args.images and args.split:
        raise usage.InputError("pass --images or --split, not both")
    return args


@torch.no_grad()
def main():
    args = parse_arguments()
    device, rank, world = usage.start_processes(args.device, args.workers)

    # ---- the classifier and the images
    network, trained = usage.load_classifier(args.run)
    network = network.to(device, memory_format=torch.channels_last).eval()
    scales = args.scales or SCALES["cnn" if trained["backbone"] in usage.CNNS else "transformer"]
    split, folder = trained["split"], args.run
    if args.images:
        data, split = usage.PhotoFolder(args.images, trained["classes"]), str(args.images)
        folder = args.run / f"images-{args.images.resolve().name}"
    else:
        data = usage.open_data(args.data or trained["data"])
        usage.check_classes(data, trained["classes"], args.run)
        if args.split and args.split != split:
            split, folder = args.split, args.run / args.split
    predicted = folder != args.run
    for results in ("seeds", "pseudo_masks"):
        usage.refuse_truth(folder / results, data)
    ids = data.split(split)
    settings = {"threshold": args.threshold, "scales": list(scales), "flip": args.flip, "refine": args.refine,
                "split": split, "data": str(data.root.resolve()), "classes": data.classes, "classifier": trained,
                "class_threshold": args.class_threshold if predicted else None}
    if rank == 0:
        usage.record_settings(folder / "seeds.json", settings, "seeds/, pseudo_masks/ and scores/")
        print(f"{data.root}: seeds of {len(ids)} images of {split}, {'predicted' if predicted else 'given'} labels, "
              f"threshold {args.threshold} (fixed), into {folder / 'seeds'}")

    # ---- seeds
    mine = ids[rank::world]
    todo = [name for name in mine if not (folder / f"seeds/{name}.png").is_file()]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of them are there")
    log = usage.Log(folder / "seeds.jsonl", len(todo))
    images = usage.Photographs(data, todo, None if predicted else data.labels(todo))
    for done, (image, labels, name) in enumerate(DataLoader(images, batch_size=None, num_workers=args.workers), start=1):
        image, size = image[None].to(device), image.shape[-2:]                      # (1, 3, H, W)
        base = [side * trained["size"] / max(size) for side in size]
        if predicted:
            view = F.interpolate(image, usage.fitting_size(base, network.align_corners), mode="bilinear", antialias=True)
            probability = usage.score_images(network, view, trained["temperature"], trained["attention"]).sigmoid()
            labels = probability[0].cpu() > args.class_threshold                    # (C,)
        present = labels.nonzero()[:, 0]                                            # (K,) the classes of the image
        levels = refined = torch.zeros(0, *size, dtype=torch.uint8)
        if len(present):
            with usage.fast_autocast(device):
                activations = usage.multi_scale_activations(network, image, base, scales, args.flip)
            activations = [s[:, present.to(device)] for s in activations]           # (1, C, h, w) -> (1, K, h, w)
            ones = torch.ones(1, len(present), device=device)
            scores = usage.seed_scores(activations, ones, size, network.align_corners)      # (1, K, H, W)
            levels = (255 * scores[0]).round().byte().cpu()                         # (K, H, W), kept in 8 bits
            if args.refine:
                refined = (255 * usage.refine_scores(image, scores, args.threshold)[0]).round().byte().cpu()
        write_results(folder, name, present, levels, refined if args.refine else None, args.threshold)
        if rank == 0 and (done % 10 == 0 or done == len(todo)):
            print("\r" + log.line(done, images=done), end="  ", flush=True)

    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        if predicted:
            labels = {name: [data.classes[c] for c in np.load(folder / f"scores/{name}.npz")["classes"]] for name in ids}
            with usage.written(folder / "labels.json") as temporary:
                temporary.write_text(json.dumps(labels, indent=0))
        columns = [folder / "seeds", *([folder / "pseudo_masks"] if args.refine else [])]
        usage.save_contact_sheet(folder / "seeds.png", data, ids, columns, folder / "scores")
        following = "" if predicted else f"python train_seg.py --run {folder}, or "
        print(f"\n{folder / 'seeds.png'} shows some\nnext: {following}python eval.py --run {folder}")


if __name__ == "__main__":
    with usage.one_line_errors("run the same command again: it continues where it stopped"):
        main()
