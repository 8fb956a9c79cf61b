"""Stage 1: train a multi-label classifier with the USAGE objective, from image-level labels alone.

    python train_cls.py --backbone resnet50                     the toy scenes, in minutes on a CPU
    python train_cls.py --data VOC --download --backbone deit_small
    python train_cls.py --temperature inf --reg-weight 0        plain CAM
    python train_cls.py --temperature 0 --reg-weight 0          multiple-instance learning (MIL)
    torchrun --nproc-per-node 4 -- train_cls.py ...             --batch-size is the total over all 4

Writes into the run folder:
    classifier.pt, classifier.jsonl     the networks after the last complete epoch, and its log
    images.json                         the data as it was found, which later stages read
    settings.json                       the flags, the mAP, the score above which a class counts
If interrupted, run it again: it continues after the last complete epoch. It never reads a true mask
to train; on the toy it draws them with the scenes.
Next: make_seeds.py.
"""

import argparse
import colorsys
import json
import math
import os
import re
import shlex
import shutil
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import usage

# The defaults, by kind of network and of initial weights: ImageNet's, or none ("scratch").
# PAPER: the rule "CNN: large temperature, Transformer: small temperature". OURS: all numbers; the
# paper's are not known to us. What EVIDENCE.md's section 8 lists was chosen on every second
# training image of 1000 VOC photographs (pretrained) or on the toy (scratch); the others were
# hardly tuned. Networks from scratch differ in temperature, size and epochs alone. The first
# `epochs` use L_GEN alone; the next `reg_epochs` add L_REG, once the teacher has something to
# teach. `teacher_decay` is lower where training is short, so that the teacher keeps up. `jitter`
# is colour jitter: off on the toy, where colours hint at the class.
SCRATCH = dict(
    reg_weight=1.0, reg_temperature=1.0, teacher_temperature=0.85, max_rate=0.5,
    teacher_decay=0.95, jitter=0.0, batch_size=16, lr=1e-3, weight_decay=0.05)
PRETRAINED = dict(
    reg_temperature=2.0, teacher_temperature=0.4, max_rate=0.5,
    teacher_decay=0.99, jitter=0.3, batch_size=16, lr=1e-4, weight_decay=0.05)
RECIPES = {
    ("cnn", "scratch"): dict(
        temperature=math.inf, size=81, epochs=2, reg_epochs=1, **SCRATCH),
    ("transformer", "scratch"): dict(
        temperature=3.0, size=112, epochs=3, reg_epochs=2, **SCRATCH),
    ("cnn", "pretrained"): dict(
        temperature=30.0, size=225, reg_weight=1.0, epochs=4, reg_epochs=4, **PRETRAINED),
    ("transformer", "pretrained"): dict(
        temperature=6.0, size=224, reg_weight=0.3, epochs=5, reg_epochs=10, **PRETRAINED),
}
# Flags whose values are added to the name of the run folder where they are not the default.
OBJECTIVE = (
    "temperature", "attention", "reg_weight", "reg_temperature", "teacher_temperature", "max_rate",
    "weak_ratio", "adaptive", "views", "teacher_decay", "random_seed")


def parse_arguments():
    number = usage.number
    parser = usage.CommandLine(__doc__, RECIPES)

    add = parser.add_argument_group("run").add_argument
    add("--run", type=Path,
        help="output folder (default: runs/DATA-BACKBONE, plus the objective's non-default flags)")
    add("--data", type=Path,
        help='folder in the layout of PASCAL VOC or MS COCO; or "toy" (default), drawn into '
             "data/toy")
    add("--download", action="store_true", help="fetch PASCAL VOC 2012 (2 GB) into --data first")
    add("--backbone", default="resnet50", choices=usage.BACKBONES,
        help="network (default resnet50)")
    add("--weights",
        help='"imagenet" (default except on the toy), "none", or a state-dict file; BatchNorm is '
             "frozen in pretrained CNNs")

    add = parser.add_argument_group("generation loss, Sec. 4.1").add_argument
    add("--temperature", type=number(0, math.inf),
        help="tau1: larger spreads the seed, smaller focuses it; inf is CAM")
    add("--attention", action="store_true",
        help="use a Transformer's class token's attention as alpha; tau1 is then unused")

    add = parser.add_argument_group("regularization loss, Sec. 4.2").add_argument
    add("--reg-weight", type=number(0, 1e6),
        help="lambda: weight of L_REG, times the learning status; 0 switches it off")
    add("--reg-temperature", type=number(1e-3, 1e6),
        help="tau2: temperature of the student's distribution in L_REG")
    add("--teacher-temperature", type=number(1e-3, 1e6),
        help="tau2': temperature of the teacher's distribution; below tau2 it sharpens the target")
    add("--max-rate", type=number(0, 1), help="the student's drop rate at a learning status of 1")
    add("--weak-ratio", type=number(0, 1), default=0.5,
        help="the teacher's drop rate, as a fraction of the student's (default 0.5)")
    add("--adaptive", action=argparse.BooleanOptionalAction, default=True,
        help="scale drop rates and lambda by the learning status (default), or keep them fixed "
             "once L_REG starts")
    add("--views", choices=("adjusted", "geometric"), default="adjusted",
        help="how the two views in L_REG differ: by dropping (default), or by the image, which the "
             "teacher sees mirrored and smaller")
    add("--teacher-decay", type=number(0, 1),
        help="decay of the teacher's moving average per step")

    add = parser.add_argument_group("training").add_argument
    add("--size", type=number(16, 10**4, int),
        help="side of the training crops; best 16n + 1 for CNNs, 16n for Transformers")
    add("--jitter", type=number(0, 1),
        help="strength of random brightness, contrast and saturation changes")
    add("--epochs", type=number(0, 10**6, int),
        help="epochs of the first learning-rate cycle, with L_GEN alone")
    add("--reg-epochs", type=number(0, 10**6, int),
        help="epochs of the second cycle, with L_GEN + lambda * q * L_REG, at half the peak "
             "learning rate")
    add("--batch-size", type=number(2, 10**6, int),
        help="images per step, over all processes; halve it if memory runs out")
    add("--lr", type=number(0, 1e6),
        help="peak learning rate; the classifier of a pretrained network gets 10 times that")
    add("--weight-decay", type=number(0, 1e6), help="AdamW's weight decay")
    add("--seed", dest="random_seed", type=number(0, 2**32, int), default=0,
        help="seed of all random numbers (default 0)")

    add = parser.add_argument_group("machine").add_argument
    add("--workers", type=number(0, usage.CORES, int), default=usage.WORKERS,
        help=f"processes that load images (default {usage.WORKERS})")
    add("--device", default="auto", help="cuda, cpu, ... (default: CUDA if available)")

    args = parser.parse_args()
    if args.download and not args.data:
        raise usage.InputError("--download needs --data FOLDER")
    if args.data is None or (args.data == Path("toy") and not args.data.is_dir()):
        args.data = TOY
    if args.weights is None:
        args.weights = "none" if args.data.resolve() == TOY.resolve() else "imagenet"
    recipe = usage.take_defaults(args, RECIPES, args.backbone, args.weights)
    if args.run is None:
        name = f"{args.data.resolve().name}-{args.backbone}"
        for key in OBJECTIVE:
            value = getattr(args, key)
            if value != recipe.get(key, parser.get_default(key)):
                name += f"-{key.replace('_', '-')}-{value}"
        args.run = Path("runs") / name
    if args.epochs + args.reg_epochs == 0:
        raise usage.InputError("nothing to train; set --epochs or --reg-epochs above 0")
    if args.attention and args.backbone in usage.CNNS:
        raise usage.InputError(f"--attention: {args.backbone} has no class token; use a DeiT as "
                               "--backbone")
    if args.views == "geometric":
        args.max_rate = 0.0                                     # the images differ instead
    return args


@torch.no_grad()
def see_as_teacher(teacher, images, views, size):
    """s', the teacher's activations: from an adjusted network, or of transformed images.

    images (B, 3, H, W); views: "adjusted", or "geometric" to mirror them and shrink them to 3/4;
    size (h, w) of the student's map -> (B, C, h, w), aligned with the student's positions.
    """
    if views == "adjusted":
        return teacher(images)
    smaller = teacher.fitting_size([0.75 * side for side in images.shape[-2:]])
    mirrored = F.interpolate(
        images.flip(-1), smaller, mode="bilinear", align_corners=False, antialias=True)
    s = teacher(mirrored).float().flip(-1)
    return F.interpolate(s, size, mode="bilinear", align_corners=False)


def learning_rate(step, first, steps):
    """The learning rate at a step, as a fraction of its peak: two cycles.

    OURS: each rises linearly for a fifth of its time and falls by a cosine; the second, with L_REG,
    has half the height unless it is the only one. first: steps of the first cycle; steps: of both.
    """
    if step < first:
        start, length, peak = 0, first, 1.0
    else:
        start, length, peak = first, max(1, steps - first), 0.5 if first else 1.0
    done = (step - start + 0.5) / length                        # at the middle of the step: never 0
    if done < 0.2:
        return peak * (done / 0.2)
    return peak * (0.5 + 0.5 * math.cos(math.pi * (done - 0.2) / 0.8))


@torch.no_grad()
def classify(network, images, args, device):
    """The class scores s~ of photographs, given by their paths: (images, C)."""
    network.eval()
    whole = v2.Compose([
        v2.Resize(network.fitting_size((args.size, args.size)), antialias=True), usage.TO_TENSOR])
    photographs = usage.Photographs(images, torch.zeros(len(images)), 0, whole)
    scores = []
    for batch, _ in DataLoader(photographs, args.batch_size, num_workers=args.workers):
        batch = usage.NORMALISE(batch.to(device, memory_format=torch.channels_last))
        s, alpha = usage.activations_and_alpha(network, batch, args.temperature, args.attention)
        scores.append(usage.class_scores(s, alpha).cpu())
    return torch.cat(scores)


def mean_average_precision(scores, labels):
    """mAP over the classes that occur: (images, C), labels in {0, 1} -> float, NaN if none occurs.

    A class's average precision is the mean, over its images, of the precision among all images
    that score at least as high; so images with equal scores count together.
    """
    averages = []
    for scored, has in zip(scores.T, labels.T):
        ranked = scored.sort().values
        found = scored[has == 1].sort().values
        hits = len(found) - torch.searchsorted(found, found)                # (images with c,)
        shown = len(ranked) - torch.searchsorted(ranked, found)
        averages.append((hits / shown).mean())                              # NaN without an image
    return torch.stack(averages).nanmean().item()


def score_threshold(scores, labels):
    """The score above which as many (image, class) pairs lie as the labels contain: a float.

    scores, labels in {0, 1}: (images, C). OURS: chosen on the training labels, without a mask.
    """
    ranked = scores.double().flatten().sort(descending=True).values
    count = int(labels.sum())
    return ranked[max(0, count - 1):count + 1].mean().item()    # between the last in and first out


def main():
    args = parse_arguments()
    device = usage.start_processes(args.device)

    # ---- data
    data = usage.from_first(prepare_data, args.data, args.download)
    classes = data["classes"]
    splits = {split: [args.data / image for image, _ in data[split].values()]
              for split in ("train", "val")}
    state = pretrained_weights(args.backbone, args.weights)
    not_settings = ("run", "data", "download", "workers", "device")
    settings = {key: value for key, value in vars(args).items() if key not in not_settings}
    settings["weights"] = str(args.weights)
    settings["initial"] = usage.fingerprint(*(state or {}).values())
    settings["images"] = usage.fingerprint(data)
    settings["photographs"] = {split: usage.sizes_of(paths) for split, paths in splits.items()}
    _, paths, all_labels = usage.read_split(data, "train", settings, args.data)
    chance = usage.chance_loss(all_labels)                      # that of class frequencies alone
    if chance == 0:
        raise usage.InputError(f"{args.data}: all images of train have the same classes; add "
                               "images with others")
    if not args.adaptive:
        chance = math.inf                                       # q is then always 1

    transform = v2.Compose([
        v2.RandomResizedCrop(args.size, scale=(0.5, 1.0)), v2.RandomHorizontalFlip(),
        v2.ColorJitter(args.jitter, args.jitter, args.jitter), usage.TO_TENSOR])
    photographs = usage.Photographs(paths, all_labels, len(classes), transform, args.random_seed)
    loader = usage.training_loader(photographs, args.batch_size, args.workers, device)
    epochs = args.epochs + args.reg_epochs
    first_steps, steps = args.epochs * len(loader), epochs * len(loader)
    few = " (few: consider a smaller --batch-size)" if steps < 100 else ""
    print(f"{args.data}: {len(paths)} images of train, {len(classes)} classes; {args.backbone} on "
          f"{device} x {usage.WORLD}, {steps} steps{few}, run folder {args.run}")

    # ---- student, teacher, optimiser
    torch.manual_seed(args.random_seed)
    with usage.reading(f"weights {args.weights}", f"not a state dict of {args.backbone}: pass one, "
                       "or the right --backbone"):
        student = usage.build_network(
            args.backbone, len(classes), state, frozen=args.weights != "none")
    student = student.to(device, memory_format=torch.channels_last)
    teacher = usage.ema_teacher(student, args.teacher_decay)
    head_lr = args.lr if args.weights == "none" else 10 * args.lr
    groups = [{"params": student.trunk.parameters(), "lr": args.lr},
              {"params": student.classifier.parameters(), "lr": head_lr}]
    optimiser = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate(step, first_steps, steps))
    ddp = nn.parallel.DistributedDataParallel(student) if usage.WORLD > 1 else student

    # ---- training: a cycle of L_GEN alone, then one with L_REG
    usage.lock(args.run)
    if not (args.run / "classifier.pt").is_file():
        for name, key in (("images.json", "root"), ("settings.json", "fingerprint")):
            if (args.run / name).is_file():                     # which would be overwritten
                remedy = "it does not belong to a run: move it away, or use another --run"
                usage.read_json(args.run / name, {key: str}, remedy)
    parts = {"student": student, "teacher": teacher, "optimiser": optimiser, "schedule": schedule}
    progress = {"epoch": 0, "log": [], "running_l_gen": math.log(2)}        # that of zero logits
    for epoch in usage.training_epochs(
            args.run / "classifier.pt", settings, parts, progress, epochs, loader):
        with_l_reg = args.reg_weight > 0 and epoch >= args.epochs
        max_rate = args.max_rate if with_l_reg else 0.0         # OURS: nothing is dropped before
        done = epoch * len(loader) * args.batch_size            # images
        student.train()
        teacher.train()

        for (images, labels), record in usage.counted(
                loader, total=steps * args.batch_size, done=done, step=args.batch_size,
                log=progress["log"]):
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            images = usage.NORMALISE(images)                                # (B, 3, H, W)
            labels = labels.to(device, non_blocking=True)                   # (B, C)

            # Sec. 4.2: how far the classifier has come.
            q = usage.learning_status(progress["running_l_gen"], chance)

            # Sec. 4.2, network adjustment: the student drops much, the teacher less, both with q.
            usage.set_adjustment(student, max_rate * q)
            usage.set_adjustment(teacher, args.weak_ratio * max_rate * q)

            # Sec. 4.1: classify the images through the spatial activation distribution alpha.
            s, alpha = usage.activations_and_alpha(
                ddp, images, args.temperature, args.attention)  # (B, C, h, w); alpha may have C = 1
            l_gen = usage.generation_loss(s, alpha, labels)

            # Sec. 4.2: pull the student's distributions to those of the teacher's view.
            l_reg = torch.zeros_like(l_gen)
            if with_l_reg:
                s_teacher = see_as_teacher(teacher.module, images, args.views, s.shape[2:])
                l_reg = usage.consistency_loss(
                    s, s_teacher, labels, args.reg_temperature, args.teacher_temperature)

            # OURS: times q, as an untrained teacher has nothing to teach.
            loss = l_gen + args.reg_weight * q * l_reg
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            teacher.update_parameters(student)

            record["L_GEN"], record["L_REG"] = usage.process_mean(l_gen, l_reg)
            record["q"] = q
            record["lr"] = schedule.get_last_lr()[0]
            schedule.step()
            # OURS: a running mean that remembers about 20 steps.
            progress["running_l_gen"] += 0.05 * (record["L_GEN"] - progress["running_l_gen"])

    # ---- what the classifier has learnt
    if usage.RANK > 0:
        return
    usage.write_json(args.run / "images.json", {"root": str(args.data.resolve()), **data})
    settings["classifier"] = usage.fingerprint(*student.state_dict().values())
    if not is_finished(args.run, settings["classifier"]):
        some = slice(None, None, max(1, len(paths) // 1000))
        scores = classify(student, paths[some], args, device)
        settings["score_threshold"] = score_threshold(scores, all_labels[some])
        _, paths, all_labels = usage.read_split(data, "val", settings, args.data)
        known = [k for k, (_, names) in enumerate(data["val"].values()) if names is not None]
        paths, all_labels = [paths[k] for k in known], all_labels[known]
        if all_labels.any():
            scores = classify(student, paths, args, device)
            settings["mAP"] = mean_average_precision(scores, all_labels)
            print(f"val, {len(paths)} images: mAP {settings['mAP']:.3f}")
        else:
            print("no mAP: there are no val images with labels")
        settings["fingerprint"] = usage.fingerprint(settings)   # tells if somebody edits them
        usage.write_json(args.run / "settings.json", settings)
    print(f"next: python make_seeds.py --run {shlex.quote(str(args.run))}")


def is_finished(run, classifier):
    """Whether the settings.json of a run is complete and of a classifier of this fingerprint."""
    try:
        settings, _ = usage.read_run(run)
    except usage.InputError:
        return False
    return settings["classifier"] == classifier


# ==== ImageNet weights ============================================================================

DEIT_WEIGHTS = "https://dl.fbaipublicfiles.com/deit/{}.pth"     # of Touvron et al.
DEIT_FILES = {
    "deit_tiny": "deit_tiny_patch16_224-a1311bcf",
    "deit_small": "deit_small_patch16_224-cd65a155",
    "deit_base": "deit_base_patch16_224-b5f2ef4d",
}
DEIT_NAMES = (          # DeiT's names of weights and torchvision's, replaced in this order
    ("blocks.", "encoder.layers.encoder_layer_"),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".attn.qkv.", ".self_attention.in_proj_"),
    (".attn.proj.", ".self_attention.out_proj."),
    (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.3."),
    ("patch_embed.proj.", "conv_proj."),
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    ("norm.", "encoder.ln."),
)


def pretrained_weights(backbone, weights):
    """The state dict of a trunk without its classifier, in torchvision's naming; None for "none".

    weights: "none"; "imagenet", torchvision's for CNNs (version 1, on which the field's CAMs are
    made) and DeiT's published ones; or a file with a state dict in torchvision's or DeiT's naming.
    """
    if weights == "none":
        return None
    remedy = "pass --weights FILE (a state dict), --weights imagenet or --weights none"
    with usage.reading(f"weights {weights} of {backbone}", remedy, any_shape=True):
        if weights != "imagenet":
            state = usage.load_checkpoint(Path(weights), {}, remedy)
        elif backbone in DEIT_FILES:
            url = DEIT_WEIGHTS.format(DEIT_FILES[backbone])
            state = torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True)
        else:
            versions = torchvision.models.get_model_weights(backbone)
            state = versions["IMAGENET1K_V1"].get_state_dict(progress=False, check_hash=True)
        state = state.get("model", state)           # DeiT's files have it under this key
        if "patch_embed.proj.weight" in state:
            for theirs, ours in DEIT_NAMES:
                state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
        trunk = {}
        for name, tensor in state.items():
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"not a state dict of {backbone}: {name} is not a tensor")
            if not name.startswith(("fc.", "classifier.", "head")):
                trunk[name.removeprefix("features.")] = tensor
    return trunk


# ==== The data: one table, whatever the layout ====================================================
#
#     {"classes": [name], "masks": {split: folder}, "outlines": {split: COCO's file, or none},
#      "train": {id: [image, [class name]]}, "val": the same, or None for unknown classes}
#
# Paths are relative to the data's root. The masks may be missing: only eval.py needs them.

TOY = Path("data/toy")


def prepare_data(root, download):
    """Draw the toy or download VOC if needed; the table of the data."""
    if download and not (root / "VOCdevkit/VOC2012").is_dir():
        download_voc(root)
    if root.resolve() == TOY.resolve():
        draw_toy(root)
    if not root.is_dir():
        raise usage.InputError(f"{root}: no such folder; pass --data FOLDER in VOC's or COCO's "
                               "layout, or --data toy")
    if (root / "annotations/instances_train2014.json").is_file():
        data = read_coco(root)
    else:
        data = read_voc(root)
    named = {name for _, names in data["train"].values() for name in names}
    nameless = [name for name in data["classes"] if name not in named]
    if nameless and named:
        print(f"warning: no image of train has {', '.join(nameless)}")
    return data


def download_voc(root):
    """PASCAL VOC 2012 in VOCdevkit/VOC2012, which is either complete or absent."""
    devkit = root / "VOCdevkit"
    partial = root / "VOC.partial"
    partial.mkdir(parents=True, exist_ok=True)
    remedy = "fetch VOCtrainval_11-May-2012.tar by hand, unpack it there and omit --download"
    with usage.reading(f"download of PASCAL VOC 2012 into {root}", remedy):
        torchvision.datasets.VOCSegmentation(partial, year="2012", image_set="train", download=True)
    devkit.mkdir(exist_ok=True)
    (partial / "VOCdevkit/VOC2012").rename(devkit / "VOC2012")
    shutil.rmtree(partial)


def read_ids(path, images):
    """The ids that a list of a split names, one on each line, in its order.

    A line is an id or a file name, or begins with one, and may have folders: "a", "a.jpg", "a 1",
    "/images/a.jpg /masks/a.png".
    """
    ids = []
    for line in usage.read_lines(path, "write the ids of the split into it, one per line"):
        blanks = [blank.start() for blank in re.finditer(r"\s+", line)]
        beginnings = [line[:end] for end in (*blanks, len(line))]
        known = []
        for text in reversed(beginnings):                       # names may have blanks
            second_path = re.search(r"\s\S*/", text)
            file = Path(text.rpartition("/")[2])
            stem = file.stem if file.suffix.lower() in usage.ENDINGS else file.name
            if not second_path:
                known += [name for name in (file.name, stem) if name in images]
        if not known:
            raise usage.InputError(
                f"{path}: there is no image named {line}; add it, or remove the line")
        ids.append(known[0])
    return list(dict.fromkeys(ids))


def read_voc(root):
    """The data of a folder in PASCAL VOC's layout, or the one that VOC's archive was unpacked in.

        JPEGImages/<id>.jpg (.png, .tif, ...)
        ImageSets/Segmentation/train.txt    one id per line; train_aug.txt or trainaug.txt wins
        ImageSets/Segmentation/val.txt      if there are images to segment
        labels.json                         {id: [class names]}; without it Annotations/<id>.xml
        classes.txt                         one name per line; without it VOC's 20
        SegmentationClass/<id>.png          true masks, to evaluate

    InputError for what is missing or does not fit.
    """
    nested = root / "VOCdevkit" / "VOC2012"
    folder = nested if nested.is_dir() else root
    names = folder / "classes.txt"
    classes = usage.read_classes(names if names.is_file() else None)
    images = usage.image_files(folder / "JPEGImages")
    table = None
    annotations = {usage.one_form(path.stem): path for path in folder.glob("Annotations/*.xml")}
    if (folder / "labels.json").is_file():
        remedy = "make it an object {id: [class names]}"
        table = usage.read_json(folder / "labels.json", {}, remedy)
        table = {usage.one_form(name): names for name, names in table.items()}

    def classes_of(name):
        if name not in (annotations if table is None else table):
            raise ValueError("has no labels")
        if table is not None:
            names = table[name]
        else:
            tree = xml.etree.ElementTree.parse(annotations[name])
            names = [node.findtext("name") for node in tree.getroot().iter("object")]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{names!r} is not a list of class names")
        names = sorted({usage.one_form(name) for name in names})
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise ValueError(f"unknown classes {', '.join(unknown)}")
        return names

    lists = folder / "ImageSets/Segmentation"
    augmented = [name for name in ("train_aug.txt", "trainaug.txt") if (lists / name).is_file()]
    files = {"train": lists / [*augmented, "train.txt"][0], "val": lists / "val.txt"}
    masks = str((folder / "SegmentationClass").relative_to(root))
    data = {"classes": classes, "masks": {"train": masks, "val": masks},
            "outlines": {"train": None, "val": None}, "train": {}, "val": {}}
    remedy = "list its classes in labels.json, using the names in classes.txt (or VOC's)"
    for split, path in files.items():
        if split == "val" and not path.is_file():
            continue
        for name in read_ids(path, images):
            known = name in (annotations if table is None else table)
            names = None
            if split == "train" or known:
                with usage.reading(f"{path}, image {name}", remedy):
                    names = classes_of(name)
            data[split][name] = [str(images[name].relative_to(root)), names]
    return data


def read_coco(root):
    """The data of MS COCO 2014 as downloaded; train leaves out images without any object.

        train2014/, val2014/                        images; an id is a file name without its ending
        annotations/instances_{train,val}2014.json  classes, in the order of their category ids
        ImageSets/Segmentation/{train,val}.txt      optional: the ids to use
        classes.txt                                 optional: another order of the classes
        SegmentationClass/<id>.png                  optional; without it eval.py draws true masks

    InputError for what is missing or does not fit.
    """
    data = {"masks": {}, "outlines": {}}
    for split in ("train", "val"):
        outlines = f"annotations/instances_{split}2014.json"
        path = root / outlines
        print(f"{path}: reading COCO's annotations", flush=True)
        files = usage.image_files(root / f"{split}2014")
        with usage.reading(path, "not COCO's instances: fetch it again", any_shape=True):
            table = json.loads(path.read_bytes(), object_hook=without_outlines)
            categories = sorted(table["categories"], key=lambda category: category["id"])
            names = {category["id"]: usage.one_form(category["name"]) for category in categories}
            ids = {image["id"]: usage.one_form(Path(image["file_name"]).stem)
                   for image in table["images"]}
            found = {number: set() for number in ids}
            for entry in table["annotations"]:
                found[entry["image_id"]].add(names[entry["category_id"]])
        classes = usage.check_classes(list(names.values()), path)
        labels = {name: sorted(found[number]) for number, name in ids.items()}
        ids = [name for name, names in labels.items() if names or split == "val"]
        own = root / f"ImageSets/Segmentation/{split}.txt"
        if own.is_file():
            ids = read_ids(own, labels)
        data[split] = {}
        for name in ids:
            if name not in files:
                raise usage.InputError(f"{root}/{split}2014/{name}.jpg: missing; fetch it again")
            data[split][name] = [str(files[name].relative_to(root)), labels[name]]
        data["outlines"][split] = outlines
        data["masks"][split] = f"annotations/masks_{split}2014"
        if (root / "SegmentationClass").is_dir():
            data["masks"][split] = "SegmentationClass"
            data["outlines"][split] = None
    data["classes"] = classes
    if (root / "classes.txt").is_file():
        data["classes"] = usage.read_classes(root / "classes.txt")
        if set(data["classes"]) != set(classes):
            raise usage.InputError(f"{root}/classes.txt: its names are not those of {path}; list "
                                   "the same names, or remove it")
    return data


def without_outlines(entry):
    """An object of COCO's files without the outlines, which take most of the memory."""
    entry.pop("segmentation", None)
    return entry


# ==== The toy =====================================================================================

TOY_CLASSES = {     # hue of head and body, hue of the glow, ink on the head (u, v in its radii)
    "striped": (0.08, 0.52, lambda u, v: np.sin(8 * u) > 0),
    "spotted": (0.97, 0.17, lambda u, v: np.cos(5 * u) * np.cos(5 * v) > 0.4),
    "ringed": (0.60, 0.03, lambda u, v: np.cos(9 * np.hypot(u, v)) > 0),
    "starred": (0.78, 0.42, lambda u, v: np.hypot(u, v) < 0.55 + 0.3 * np.cos(
        5 * np.arctan2(v, u))),
    "checked": (0.47, 0.86, lambda u, v: np.sin(5 * u) * np.sin(5 * v) > 0),
}


def draw_toy(root, train=800, val=200, side=128):
    """Draw the toy once: little creatures (critters), to provoke the failures the paper reports.

    A critter's small patterned head gives its class away; its long body has the class's hue in most
    critters only, so that a CNN may be content with the head. Most lie in a soft glow, whose hue
    also depends on the class; it is not part of them, but a Transformer's seed spreads over it.
    Pebbles come in all hues. The pictures are the same on every machine, up to the JPEG library's
    rounding. Returns root; writes nothing if its labels are there.
    """
    if (root / "labels.json").is_file():
        return root
    if root.exists():
        raise usage.InputError(f"{root}: is in the way, and is not the toy; rename it")
    partial = root.with_name(f".partial-{os.getpid()}-{root.name}")
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (partial / folder).mkdir(parents=True, exist_ok=True)
    texts = {"classes.txt": TOY_CLASSES}
    labels = {}
    for key, (split, count) in enumerate((("train", train), ("val", val))):
        names = [f"{split}_{k:04d}" for k in range(count)]
        texts[f"ImageSets/Segmentation/{split}.txt"] = names
        for number, name in enumerate(names):
            photo, mask = draw_scene(np.random.default_rng((key, number)), side)
            Image.fromarray(photo).save(partial / f"JPEGImages/{name}.jpg", quality=95)
            usage.save_mask(partial / f"SegmentationClass/{name}.png", mask)
            labels[name] = [c for k, c in enumerate(TOY_CLASSES, start=1) if (mask == k).any()]
    for name, lines in texts.items():
        (partial / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    usage.write_json(partial / "labels.json", labels)
    try:
        partial.rename(root)
    except OSError:                                             # another process was faster
        if not (root / "labels.json").is_file():
            raise
        shutil.rmtree(partial)
    return root


def draw_scene(rng, side):
    """One toy scene, lengths in units of the side: photograph (side, side, 3) and mask, uint8."""
    def hsv(*colour):
        return np.float32(colorsys.hsv_to_rgb(*colour))

    def towards(angle):
        return np.stack([np.cos(angle), np.sin(angle)], -1)

    def ball(place, radius, colour, label, pattern=lambda u, v: True):
        box = tuple(slice(max(0, int((p - radius) * fine)), max(0, int((p + radius) * fine) + 1))
                    for p in place[::-1])
        u = (x[:, box[1]] - place[0]) / radius
        v = (y[box[0]] - place[1]) / radius
        part = (u ** 2 + v ** 2 < 1) & pattern(u, v)
        photo[box][part] = (colour * (1.1 - 0.35 * (u ** 2 + v ** 2)[..., None]))[part]
        mask[box][part] = label

    fine = 2 * side                                             # drawn twice as large: smooth edges
    y = (np.arange(fine, dtype=np.float32)[:, None] + 0.5) / fine           # (fine, 1)
    x = y.T                                                                 # (1, fine)
    fog = Image.fromarray((rng.random((5, 5)) * 255).astype(np.uint8))
    fog = fog.resize((fine, fine), Image.Resampling.BICUBIC)
    dark, light = (hsv(rng.uniform(0.15, 0.4), 0.18, rng.uniform(*values))
                   for values in ((0.5, 0.8), (0.7, 0.95)))
    fog = np.asarray(fog, dtype=np.float32)[..., None] / 255
    photo = dark + fog * (light - dark)                         # (fine, fine, 3) in [0, 1]
    mask = np.zeros((fine, fine), dtype=np.uint8)

    critters = []
    looks = dict(enumerate(TOY_CLASSES.values(), start=1))
    order = 1 + rng.permutation(len(TOY_CLASSES))
    count = rng.choice([1, 2, 3], p=[0.4, 0.45, 0.15])
    for label in order[:count]:
        for _ in range(50):                                     # tries to find a free place
            radius = rng.uniform(0.075, 0.095)                  # of the head
            heading = rng.uniform(0, 2 * np.pi) + rng.uniform(-0.45, 0.45) * np.arange(6)
            start = rng.uniform(0.1, 0.9, 2)
            joints = start + np.cumsum(1.05 * radius * towards(heading), 0)     # (6, 2), tail first
            inside = joints.min() > 1.5 * radius and joints.max() < 1 - 1.5 * radius
            if inside and all(
                    np.linalg.norm(joints[:, None] - others, axis=-1).min() > 1.5 * (radius + other)
                    for _, other, others, _ in critters):
                critters.append((label, radius, joints, heading))
                break
    for label, radius, joints, _ in critters:
        if rng.random() < 0.7:                                  # the glow
            glow = np.max([np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * radius) ** 2)
                           for px, py in joints[1::2]], 0)
            photo += 0.4 * glow[..., None] * (hsv(looks[label][1], 0.6, 0.95) - photo)
    for _ in range(rng.integers(2, 6)):                         # pebbles
        place, radius = rng.random(2), rng.uniform(0.03, 0.07)
        ball(place, radius, hsv(rng.random(), rng.uniform(0.2, 0.5), rng.uniform(0.5, 0.9)), 0)
    for label, radius, joints, heading in critters:
        hue, _, ink = looks[label]
        value = rng.uniform(0.6, 0.95)
        body = hsv(hue if rng.random() < 0.85 else rng.random(), 0.45, value)
        for turn in (-1.5, 1.5):
            for foot in joints + 1.2 * radius * towards(heading + turn):
                ball(foot, 0.28 * radius, 0.5 * body, label)
        for k, place in enumerate(joints[:-1]):
            ball(place, (0.9 + 0.09 * k) * radius, body * (1 if k % 2 else 0.9), label)
        for turn in (-0.5, 0.5):                                # feelers
            tip = joints[-1] + 1.15 * radius * towards(heading[-1] + turn)
            ball(tip, 0.2 * radius, 0.4 * body, label)
        ball(joints[-1], radius, hsv(hue, 0.1, 1.0), label)
        ball(joints[-1], 0.9 * radius, hsv(hue, 0.95, 0.6), label, ink)
    photo = photo.clip(0, 1).reshape(side, 2, side, 2, 3).mean((1, 3))
    return (255 * photo).astype(np.uint8), mask[::2, ::2]


if __name__ == "__main__":
    with usage.one_line_errors("run the same command again"):
        main()
