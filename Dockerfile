# One image for the backend's HTTP server and its workers. It holds no weights and accepts no licence: the checkpoint is
# mounted and MMM_LICENSE_ACCEPTED is given by whoever runs it.
FROM node:22-slim AS panel
WORKDIR /panel
COPY backend/web/panel/package.json backend/web/panel/package-lock.json ./
RUN npm ci --ignore-scripts --no-audit --no-fund

FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    HOST=0.0.0.0 \
    MODEL_DIR=/data

# 1000 is the user of most single-user machines, so that files under a mounted folder belong to somebody there.
RUN useradd --create-home --uid 1000 wsc && install -d -o wsc -g wsc /data /slides

WORKDIR /app
# What is installed (torch and all) depends on this one file: an edit of the code does not install it again.
COPY pyproject.toml ./
RUN mkdir backend && touch backend/__init__.py README.md LICENSE \
    && pip install . \
    && pip uninstall --yes wsc-label-studio-backend \
    && rm -r backend README.md LICENSE
COPY README.md LICENSE ./
COPY backend ./backend
COPY --from=panel /panel/node_modules/openseadragon/build/openseadragon/openseadragon.min.js /panel/node_modules/openseadragon/LICENSE.txt ./backend/web/panel/vendor/
RUN pip install --no-deps .

USER wsc
WORKDIR /data
VOLUME /data
EXPOSE 9090

# For `serve`; 401 is an answer too, where a password is set. Workers have no port: docker-compose.yml switches this off for them, and Redis knows which of them live.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=4 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PORT', 9090)), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status >= 500)"]

ENTRYPOINT ["wsc-backend"]
CMD ["serve"]
