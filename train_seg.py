"""Stage 3: train an ordinary segmentation network on the pseudo masks, and let it label the val images.

    python train_seg.py --run runs/toy-resnet50
    python train_seg.py --run runs/toy-resnet50 --seeds DIR        on anybody's pseudo masks of the same images

The backbone of stage 1 with torchvision's DeepLab head. Reads classifier.pt and pseudo_masks/, or seeds/ where there was
no refinement. Writes segmenter.pt, segmenter.jsonl, segmentation/<id>.png and segmentation.png into the run folder; started
again, it goes on after the last finished epoch. No true mask is opened but for the sheet segmentation.png. Next: eval.py.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import tv_tensors
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.transforms import v2

import usage

# The defaults, per kind of network and of data. All numbers OURS; the authors' own segmentation is DeepLab or larger.
RECIPES = {
    ("cnn", "toy"): dict(epochs=4, batch_size=16, lr=3e-4),
    ("transformer", "toy"): dict(epochs=4, batch_size=16, lr=3e-4),
    ("cnn", "photos"): dict(epochs=5, batch_size=16, lr=1e-4),
    ("transformer", "photos"): dict(epochs=8, batch_size=16, lr=1e-4),
}
SCALES = (1.0, 1.5)                 # OURS: at test time, each with its mirror image


class Segmenter(nn.Module):
    """Images (B, 3, H, W) -> logits (B, C + 1, h, w), background first: a classifier's trunk under a DeepLab head."""

    def __init__(self, network, num_classes):
        super().__init__()
        self.network, self.align_corners = network, network.align_corners
        self.network.classifier = nn.Identity()
        self.head = DeepLabHead(network.channels, num_classes + 1, atrous_rates=(6, 12, 18))    # DeepLab's at stride 16

    def forward(self, images):
        return self.head(self.network.features(images))


class SeedMasks(Dataset):
    """Image (3, size, size) and its seed (size, size), cut and coloured at random: by seed, epoch and index alone."""

    def __init__(self, data, ids, folder, size, jitter, seed):
        self.data, self.ids, self.folder, self.seed, self.epoch = data, ids, folder, seed, 0
        colour = [v2.ColorJitter(0.3, 0.3, 0.3)] if jitter else []
        self.transform = v2.Compose([v2.RandomResizedCrop(size, scale=(0.4, 1.0)),
                                     v2.RandomHorizontalFlip(), *colour])

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        name = self.ids[index]
        image = usage.read_image(self.data.images[name])
        seed = usage.read_mask(self.folder / f"{name}.png", image.size[::-1], len(self.data.classes))
        with usage.random_numbers(self.seed, self.epoch, index):
            image, seed = self.transform(image, tv_tensors.Mask(seed))
        return usage.TO_TENSOR(image), torch.as_tensor(seed).long()


@torch.no_grad()
def predict(segmenter, loader, size, refine, folder, device, log):
    """Write the label map of every image: scales and flips voted by probability, edges refined as those of seeds are."""
    segmenter.eval()
    for done, (image, _, name) in enumerate(loader, start=1):
        image = image[None].to(device)                                              # (1, 3, H, W)
        base = [side * size / max(image.shape[-2:]) for side in image.shape[-2:]]
        with usage.fast_autocast(device):
            logits = usage.multi_scale_activations(segmenter, image, base, SCALES, flip=True)
        votes = sum(F.interpolate(s.float(), image.shape[-2:], mode="bilinear", align_corners=segmenter.align_corners)
                    .softmax(1) for s in logits)                                    # (1, C + 1, H, W)
        share = votes[:, 1:] / (votes[:, 1:] + votes[:, :1])    # (1, C, H, W), above 0.5 where a class beats the background
        classes = (share.amax((0, 2, 3)) > 0.1).nonzero()[:, 0]                     # (K,) those in question
        share = share[:, classes]
        if refine and len(classes):
            share = usage.refine_scores(image, share, 0.5)
        usage.save_mask(folder / f"{name}.png", usage.label_map(share, 0.5, classes)[0].cpu())
        if log and (done % 10 == 0 or done == len(loader)):
            print("\r" + log.line(done, predicted=done), end="  ", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     epilog="Flags without a default here take it from the table RECIPES in this file.")
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/toy-resnet50"), help="folder of stages 1 and 2 (default runs/toy-resnet50)")
    add("--data", help="where the data lies now, if it has moved since stage 1")
    add("--seeds", type=Path, help="folder of label maps to learn from; 255 is ignored (default: what make_seeds.py left)")
    add("--weights", help='start from "imagenet", "none" or a state dict, instead of from the classifier')
    add("--epochs", type=int)
    add("--batch-size", type=int, help="over all processes; halve it when memory runs out")
    add("--lr", type=float, help="start of the polynomial schedule for the trunk; the new head gets 10 times that")
    add("--refine", action=argparse.BooleanOptionalAction, default=True,
        help="let the predicted label maps follow the edges of the image (default yes)")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=usage.WORKERS, help=f"processes that load images (default {usage.WORKERS})")
    add("--device", default="auto", help="cuda, cpu, ... (default: CUDA where there is one)")
    args = parser.parse_args()
    device, rank, world = usage.start_processes(args.device, args.workers)

    # ---- the run so far
    network, trained = usage.load_classifier(args.run)
    kind = "cnn" if trained["backbone"] in usage.CNNS else "transformer"
    photos = bool(trained["photos"])
    for flag, value in RECIPES[kind, "photos" if photos else "toy"].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.epochs < 1 or not args.lr > 0 or args.batch_size % world or args.batch_size < 2 * world:
        raise usage.InputError(f"--epochs and --lr must be positive, --batch-size a multiple of the {world} processes and "
                               "at least 2 for each")
    data = usage.open_data(args.data or trained["data"])
    usage.check_classes(data, trained["classes"], args.run)
    made_with = None if args.seeds else usage.read_json(args.run / "seeds.json")
    folder = args.seeds or args.run / ("pseudo_masks" if made_with["refine"] else "seeds")
    usage.refuse_truth(folder, data)
    ids = data.split(trained["split"])
    missing = [name for name in ids if not (folder / f"{name}.png").is_file()]
    if missing:
        raise usage.InputError(f"{folder / missing[0]}.png: no such seed; run make_seeds.py --run {args.run} to its end")
    train_set = SeedMasks(data, ids, folder, trained["size"], photos, args.seed)
    sampler = DistributedSampler(train_set, world, rank, seed=args.seed, drop_last=True)
    loader = DataLoader(train_set, args.batch_size // world, sampler=sampler, num_workers=args.workers, drop_last=True,
                        pin_memory=device.type == "cuda")
    if not len(loader):
        raise usage.InputError(f"--batch-size {args.batch_size}: there are {len(train_set)} seeds; pass fewer")
    if rank == 0:
        print(f"{data.root}: {len(train_set)} seeds of {folder}; {trained['backbone']} with DeepLab's head on {device} x "
              f"{world}")

    # ---- network and optimiser
    torch.manual_seed(args.seed)
    frozen = (args.weights or trained["weights"]) != "none" and kind == "cnn"   # BatchNorm of the trunk, as in stage 1
    if args.weights:
        network = usage.build_network(trained["backbone"], len(data.classes), args.weights)
    if frozen:
        usage.freeze_batchnorm(network)
    segmenter = Segmenter(network, len(data.classes)).to(device, memory_format=torch.channels_last)
    groups = [{"params": [p for p in segmenter.network.parameters() if p.requires_grad], "lr": args.lr},
              {"params": segmenter.head.parameters(), "lr": 10 * args.lr}]
    optimiser = torch.optim.AdamW(groups, weight_decay=trained["weight_decay"], fused=True)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, args.epochs * len(loader), power=0.9)
    ddp = nn.parallel.DistributedDataParallel(segmenter) if world > 1 else segmenter

    # ---- resume
    path = args.run / "segmenter.pt"
    settings = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed,
                "weights": args.weights, "seeds": str(folder.resolve()), "data": str(data.root.resolve()),
                "classes": data.classes, "split": "val", "seeds_made_with": made_with}
    parts = {"segmenter": segmenter, "optimiser": optimiser, "schedule": schedule}
    state = {"epoch": 0, "seconds": 0.0} | usage.resume(path, settings, parts)
    epoch, seconds = state["epoch"], state["seconds"]
    if epoch and rank == 0:
        print(f"{path}: {epoch} of {args.epochs} epochs done")

    # ---- training
    log = usage.Log(args.run / "segmenter.jsonl", args.epochs * len(loader) * args.batch_size,
                    epoch * len(loader) * args.batch_size)
    while epoch < args.epochs:
        start = time.time()
        torch.manual_seed(hash((args.seed, epoch, rank)))                       # an epoch done again is the same epoch
        sampler.set_epoch(epoch)
        train_set.epoch = epoch
        segmenter.train()
        if frozen:
            usage.freeze_batchnorm(segmenter.network)
        for step, (images, seeds) in enumerate(loader, start=epoch * len(loader) + 1):
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            seeds = seeds.to(device, non_blocking=True)                         # (B, H, W)
            with usage.fast_autocast(device):
                logits = ddp(images)                                            # (B, C + 1, h, w)
            logits = F.interpolate(logits.float(), seeds.shape[-2:], mode="bilinear",
                                   align_corners=segmenter.align_corners)       # (B, C + 1, H, W)
            counted = (seeds != usage.VOID).sum() / world
            if world > 1:
                torch.distributed.all_reduce(counted)                           # a mean over the pixels of all processes
            loss = F.cross_entropy(logits, seeds, ignore_index=usage.VOID, reduction="sum") / counted.clamp_min(1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            mean_loss = loss.detach()
            if world > 1:
                torch.distributed.all_reduce(mean_loss)
            mean_loss = mean_loss.item() / world
            if not mean_loss < float("inf"):
                raise usage.InputError(f"step {step}: the loss is not finite ({mean_loss}); lower --lr; {path} holds the "
                                       "last finished epoch")
            if rank == 0 and (step % 10 == 0 or step == args.epochs * len(loader)):
                print("\r" + log.line(step * args.batch_size, step=step, loss=mean_loss, lr=schedule.get_last_lr()[0]),
                      end="  ", flush=True)
        epoch, seconds = epoch + 1, seconds + time.time() - start
        if rank == 0:
            usage.save_checkpoint(path, {"settings": settings, "epoch": epoch, "seconds": seconds,
                                         **{name: part.state_dict() for name, part in parts.items()}})

    # ---- prediction
    if not data.has_split("val"):
        print(f"\n{data.root}: no val split, nothing to predict")
        return
    ids = data.split("val")
    if rank == 0:
        print(f"\ntrained in {seconds / 60:.1f} min; labelling {len(ids)} images of val")
        usage.record_settings(args.run / "segmentation.json", settings | {"refine": args.refine}, "segmentation/")
    todo = [name for name in ids[rank::world] if not (args.run / f"segmentation/{name}.png").is_file()]
    log = usage.Log(args.run / "segmentation.jsonl", len(todo)) if rank == 0 else None
    images = DataLoader(usage.Photographs(data, todo), batch_size=None, num_workers=args.workers)
    predict(segmenter, images, trained["size"], args.refine, args.run / "segmentation", device, log)
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        usage.save_contact_sheet(args.run / "segmentation.png", data, ids, [args.run / "segmentation"])
        print(f"\n{args.run / 'segmentation.png'} shows some\nnext: python eval.py --run {args.run}")


if __name__ == "__main__":
    with usage.one_line_errors("run the same command again: it goes on after the last finished epoch"):
        main()
