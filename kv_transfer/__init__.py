"""The hand-over of KV blocks from the worker that computed them to the worker that goes on with the request.

The reader pulls; only the owner of a pool writes into it. ``session`` says who may read what until when, ``plan`` what
is to be sent, ``transports`` move bytes, ``source`` and ``receiver`` are the two ends that a worker composes.
"""
