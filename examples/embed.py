"""What a console does with one radiograph: a signed bundle, its findings, and where each that is present was seen.

python examples/embed.py BUNDLE trust.toml radiograph.png OUT
"""

import sys
from pathlib import Path

from PIL import Image

from chexnet_deploy import ChexnetError, ImageError, Predictor, Trust, draw_cam, read_image

bundle, trust, radiograph, out = sys.argv[1:]
try:
    predictor = Predictor.open(bundle, trust=Trust.read(trust), provider="cpu")
except ChexnetError as err:  # unsigned, changed, or answering otherwise than when it was released
    sys.exit(f"out of service: {err}")
with predictor:
    try:
        prediction = predictor.predict(radiograph)
        gray = read_image(radiograph)
    except ImageError as err:  # this radiograph can't be used; the next one may be
        sys.exit(f"refused, {err.reason.value}: {err}")
Path(out).mkdir()
for finding, probability in prediction.probabilities.items():
    print(f"{finding:20} {probability:.3f}{'  present' if prediction.present.get(finding) else ''}")
    if prediction.present.get(finding):
        Image.fromarray(draw_cam(gray, prediction.maps[finding])).save(Path(out) / f"{finding}.png")
