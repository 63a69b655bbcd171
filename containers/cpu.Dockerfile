# Not built here: no Docker daemon was at hand. Its install line is that of docs/serving.md.
# docker build -f containers/cpu.Dockerfile -t chexnet-deploy .
# docker run --rm -v $PWD/bundles:/bundles:ro -v $PWD/scans:/scans:ro chexnet-deploy predict /bundles/first/int8 /scans --json
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY engines engines
COPY chexnet_deploy chexnet_deploy
RUN pip install --no-cache-dir '.[serve,cpu,openvino,dicom]'
RUN useradd --create-home chexnet
USER chexnet
WORKDIR /home/chexnet
ENTRYPOINT ["chexnet-deploy"]
CMD ["doctor"]
