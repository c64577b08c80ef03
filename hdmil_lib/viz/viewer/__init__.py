"""A viewer of whole slides for notebooks, with one value per tile drawn over the slide.

`SlideViewer` shows a slide in JupyterLab and other front ends that run an anywidget. It
uses OpenSeadragon (openseadragon.min.js, BSD license in openseadragon.LICENSE.txt). The tiles come over the
connection of the widget, so that neither a server nor a proxy is needed.
"""

from hdmil_lib.viz.viewer.layers import Overlay
from hdmil_lib.viz.viewer.scatter import TileScatter, link_scatter
from hdmil_lib.viz.viewer.slide_viewer import SlideViewer, viewer_of

__all__ = ["Overlay", "SlideViewer", "TileScatter", "link_scatter", "viewer_of"]
