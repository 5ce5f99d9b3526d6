"""Certify picture files of your own.

    python -m extras.pictures a.png b.jpg --sigma 0.25         # and certify.py's flags
"""

import sys

import torch

from certify import (
    ABSTAIN,
    certify,
    fit,
    one_line_errors,
    open_for_certification,
    open_picture,
    open_procedure,
    parse,
    predict,
)


def main(argv):
    files = argv[:next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))]
    args, checkpoint = parse(argv[len(files):])
    procedure, _ = open_procedure(args.procedure)
    f, test, device = open_for_certification(args, checkpoint)
    how = dict(sigma=args.sigma, n=args.n, alpha=args.alpha, seed=args.seed, batch=args.batch)
    names = {ABSTAIN: "abstains"} | dict(enumerate(test.classes))
    channels = len(test.items[0][0])
    pictures = [open_picture(file, channels) for file in files]
    for index, (file, picture) in enumerate(zip(files, pictures, strict=True)):
        if picture.size != (test.size, test.size):
            print(f"{file}: fitted to {test.size} x {test.size}, the radius is in pixels of that")
        x = fit(picture, test.size).to(device, torch.float32) / 255
        own = dict(bound=args.bound, procedure=procedure, radii=args.radii)
        guess, radius = certify(f, x, n0=args.n0, index=index, **own, **how)
        sure = f", certified within an l2 radius of {radius:.6f}" if radius else ""
        vote = predict(f, x, index=index, **how)
        print(f"{file}: {names[guess]}{sure} (without a radius: {names[vote]})")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
