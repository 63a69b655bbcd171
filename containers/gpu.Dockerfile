# Not built here: no Docker daemon was at hand. Its install lines are those of README.md and docs/tensorrt.md.
# docker build -f containers/gpu.Dockerfile -t chexnet-workstation .
# docker run --rm --gpus all -v $PWD:/work chexnet-workstation build bundles/first/int8 --out bundles/first/int8-plan
# The driver is the machine's own, 580 or later, by NVIDIA's container toolkit; for 535 to 575 write gpu-cu12.
FROM python:3.11-slim
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY engines engines
COPY training training
COPY chexnet_deploy chexnet_deploy
RUN pip install --no-cache-dir '.[export]'
RUN pip install --no-cache-dir '.[gpu-cu13]'
ENV PYTHONPATH=/src
RUN useradd --create-home chexnet
USER chexnet
WORKDIR /work
ENTRYPOINT ["chexnet-deploy"]
CMD ["doctor"]
