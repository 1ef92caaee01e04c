"""The HTML report: one page that needs no network, made from the results of the analyses.

``content.py`` defines the contents of a page, ``pictures.py`` makes its images, ``charts.py`` its figures, and
``page.py`` renders ``page.html.jinja`` with ``page.css`` and ``page.js``. jinja2 is needed:
``pip install 'clipfast[report]'``.
"""
