# Not built here: no Docker daemon was at hand. Its install line is that of docs/dicom-node.md.
# docker build -f containers/node.Dockerfile -t chexnet-node .
# docker run -d -p 11112:11112 -v node:/var/lib/chexnet-node -v $PWD/bundles:/bundles:ro -v $PWD/node.toml:/etc/chexnet/node.toml:ro chexnet-node
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY engines engines
COPY chexnet_deploy chexnet_deploy
RUN pip install --no-cache-dir '.[node,cpu]'
# The node's folder is its owner's alone, or the node refuses it.
RUN useradd --create-home chexnet && install -d -m 700 -o chexnet -g chexnet /var/lib/chexnet-node
USER chexnet
WORKDIR /var/lib/chexnet-node
VOLUME /var/lib/chexnet-node
EXPOSE 11112
ENTRYPOINT ["chexnet-deploy", "node"]
CMD ["/etc/chexnet/node.toml"]
