"""The application for mammography: public data sets, phantoms, published methods and networks, viewer and demo.

It is built on the rest of `gigamorph.engine`, which does not import it. `registered` lists what it adds to the engine.
"""
