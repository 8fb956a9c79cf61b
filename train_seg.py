"""Stage 3: train an ordinary segmentation network on the pseudo masks, and label the val images.

    python train_seg.py --run runs/toy-resnet50
    python train_seg.py --run runs/toy-resnet50 --pseudo-masks DIR      other masks of the images

The network of stage 1 with torchvision's DeepLab head. Reads train/pseudo_masks/. Writes into the
run folder
    segmenter.pt, segmenter.jsonl       the network after the last complete epoch, and its log
    segmentation/<id>.png               label maps of the val images, and their settings.json
If interrupted, run it again: it continues after the last complete epoch. It opens no true mask.
Next: eval.py.
"""

import argparse
import shlex
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.transforms import v2

import usage

# The defaults, by kind of network and of initial weights. OURS: all numbers.
RECIPES = {
    ("cnn", "scratch"): dict(epochs=4, batch_size=16, lr=3e-4),
    ("transformer", "scratch"): dict(epochs=4, batch_size=16, lr=3e-4),
    ("cnn", "pretrained"): dict(epochs=5, batch_size=16, lr=1e-4),
    ("transformer", "pretrained"): dict(epochs=8, batch_size=16, lr=1e-4),
}
SCALES = (1.0, 1.5)     # OURS: of the predicted images, each with its mirror image


def parse_arguments():
    number = usage.number
    parser = usage.CommandLine(__doc__, RECIPES)

    add = parser.add_argument_group("run").add_argument
    add("--run", type=Path, default=Path("runs/toy-resnet50"),
        help="folder of stages 1 and 2 (default runs/toy-resnet50)")
    add("--data", type=Path, help="where the data lies now, if it has moved since stage 1")
    add("--pseudo-masks", type=Path,
        help="label maps to learn from; 255 is ignored (default: those of make_seeds.py)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(1, 10**6, int), help="passes over the pseudo masks")
    add("--batch-size", type=number(2, 10**6, int),
        help="images per step, over all processes; halve it if memory runs out")
    add("--lr", type=number(0, 1e6),
        help="initial learning rate of the trunk; the new head gets 10 times that")
    add("--seed", dest="random_seed", type=number(0, 2**32, int), default=0,
        help="seed of all random numbers (default 0)")

    add = parser.add_argument_group("prediction").add_argument
    add("--refine", action=argparse.BooleanOptionalAction, default=True,
        help="refine the predicted label maps along image edges (default)")

    add = parser.add_argument_group("machine").add_argument
    add("--workers", type=number(0, usage.CORES, int), default=usage.WORKERS,
        help=f"processes that load images (default {usage.WORKERS})")
    add("--device", default="auto", help="cuda, cpu, ... (default: CUDA if available)")
    return parser.parse_args()


def find_pseudo_masks(args, data, settings):
    """The paths of the training images' pseudo masks, and what they were made with."""
    folder = args.pseudo_masks
    made_with = None
    remedy = "add it, or correct --pseudo-masks"
    if folder is None:
        folder = args.run / "train/pseudo_masks"
        remedy = f"run make_seeds.py --run {args.run} first"
        made_with = usage.read_json(args.run / "train/settings.json", {"classifier": dict}, remedy)
        if made_with["classifier"] != settings:
            raise usage.InputError(f"{args.run}/train: made with a different classifier; run "
                                   f"make_seeds.py --run {args.run} again")
    truth = Path(args.data or data["root"], data["masks"]["train"])
    if folder.resolve() == truth.resolve():
        raise usage.InputError(f"{folder}: is the folder of the true masks; use another folder")
    files = usage.image_files(folder, (".png",))
    missing = [name for name in data["train"] if name not in files]
    if missing:
        raise usage.InputError(f"{folder}/{missing[0]}.png: missing; {remedy}")
    paths = [files[name] for name in data["train"]]
    masks = (usage.read_mask(path, None, len(data["classes"])) for path in paths)
    if args.pseudo_masks and not any(((mask > 0) & (mask < usage.VOID)).any() for mask in masks):
        raise usage.InputError(f"{folder}: no mask has a pixel of any class, only 0 (background) "
                               "and 255 (void); write class numbers, 1 for the first class")
    return paths, made_with


@torch.no_grad()
def predict(segmenter, image, longer, refine):
    """The label map (h, w) of an image (1, 3, h, w), its longer side at scale 1 given in pixels.

    Probabilities are averaged over scales and flips, then refined along edges like the seeds.
    """
    logits = usage.multi_scale_activations(segmenter, image, longer, SCALES, flip=True)
    votes = 0
    for s in logits:
        s = F.interpolate(s.float(), image.shape[2:], mode="bilinear", align_corners=False)
        votes = votes + s.softmax(1)                                        # (1, C + 1, h, w)
    # A class's share is above 0.5 where the class has more votes than the background.
    share = votes[:, 1:] / (votes[:, 1:] + votes[:, :1])                    # (1, C, h, w)
    classes = (share.amax((0, 2, 3)) > 0.1).nonzero()[:, 0]                 # (K,) those in question
    share = share[:, classes]
    if refine and len(classes):
        share = usage.refine_maps(image, share, 0.5)
    return usage.label_map(share, 0.5, classes)[0]


def main():
    args = parse_arguments()
    device = usage.start_processes(args.device)

    # ---- the run so far
    trained, data = usage.read_run(args.run)
    classes = data["classes"]
    segmenter = usage.load_classifier(args.run, trained, len(classes))
    usage.take_defaults(args, RECIPES, trained["backbone"], trained["weights"])
    _, images, _ = usage.read_split(data, "train", trained, args.data)
    val_ids, val_images, _ = usage.read_split(data, "val", trained, args.data)
    masks, seeds = find_pseudo_masks(args, data, trained)
    settings = {
        "epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr,
        "random_seed": args.random_seed, "pseudo_masks": usage.fingerprint(*masks),
        "seeds": seeds, "classifier": trained}
    transform = v2.Compose([
        v2.RandomResizedCrop(trained["size"], scale=(0.4, 1.0)), v2.RandomHorizontalFlip(),
        v2.ColorJitter(trained["jitter"], trained["jitter"], trained["jitter"]), usage.TO_TENSOR])
    photographs = usage.Photographs(images, masks, len(classes), transform, args.random_seed)
    loader = usage.training_loader(photographs, args.batch_size, args.workers, device)
    print(f"{len(masks)} label maps of {masks[0].parent}; {trained['backbone']} with DeepLab's "
          f"head on {device} x {usage.WORLD}")

    # ---- network and optimiser
    torch.manual_seed(args.random_seed)
    channels = segmenter.classifier.in_channels
    segmenter.classifier = DeepLabHead(
        channels, len(classes) + 1, atrous_rates=(6, 12, 18))   # DeepLab's at stride 16
    segmenter = segmenter.to(device, memory_format=torch.channels_last)
    groups = [{"params": segmenter.trunk.parameters(), "lr": args.lr},
              {"params": segmenter.classifier.parameters(), "lr": 10 * args.lr}]
    optimiser = torch.optim.AdamW(groups, weight_decay=trained["weight_decay"], fused=True)
    steps = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, steps, power=0.9)
    ddp = nn.parallel.DistributedDataParallel(segmenter) if usage.WORLD > 1 else segmenter

    # ---- training
    usage.lock(args.run)
    parts = {"segmenter": segmenter, "optimiser": optimiser, "schedule": schedule}
    progress = {"epoch": 0, "log": []}
    for epoch in usage.training_epochs(
            args.run / "segmenter.pt", settings, parts, progress, args.epochs, loader):
        segmenter.train()
        done = epoch * len(loader) * args.batch_size            # images
        for (images, masks), record in usage.counted(
                loader, total=steps * args.batch_size, done=done, step=args.batch_size,
                log=progress["log"]):
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            images = usage.NORMALISE(images)                                # (B, 3, H, W)
            masks = masks.to(device, non_blocking=True).long()              # (B, H, W)
            logits = ddp(images).float()                                    # (B, C + 1, h, w)
            logits = F.interpolate(
                logits, masks.shape[1:], mode="bilinear", align_corners=False)
            certain = (masks != usage.VOID).sum().clamp_min(1)
            total = F.cross_entropy(logits, masks, ignore_index=usage.VOID, reduction="sum")
            loss = total / certain
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            record["loss"], = usage.process_mean(loss)
            record["lr"] = schedule.get_last_lr()[0]
            schedule.step()

    # ---- prediction
    if not val_ids:
        print("no val images to predict")
        return
    print(f"predicting {len(val_ids)} images of val into {args.run / 'segmentation'}")
    segmenter.eval()
    predicted_with = {
        "refine": args.refine, **settings,
        "segmenter": usage.fingerprint(*segmenter.state_dict().values())}
    with usage.whole_folder(args.run / "segmentation", predicted_with) as folder:
        todo = [k for k in range(usage.RANK, len(val_ids), usage.WORLD)
                if not usage.is_there(folder / f"{val_ids[k]}.png")]
        photographs = usage.WholePhotographs([val_images[k] for k in todo])
        loader = photographs.loader(args.workers)
        for (k, (image, size)), _ in usage.counted(zip(todo, loader), len(todo)):
            image = usage.NORMALISE(usage.TO_TENSOR(image)[None].to(device))    # (1, 3, h, w)
            labels = predict(segmenter, image, trained["size"], args.refine).cpu()
            usage.save_mask(folder / f"{val_ids[k]}.png", usage.resized_labels(labels, size))
    if usage.true_masks(data, "val", args.data) or data["outlines"]["val"]:
        print(f"next: python eval.py --run {shlex.quote(str(args.run))}")


if __name__ == "__main__":
    with usage.one_line_errors("run the same command again: it continues where it stopped"):
        main()
