// Colour maps as tables of 256 RGB triples, linear between every eighth colour.
// viridis, magma: by N. J. Smith and S. van der Walt, CC0 (https://bids.github.io/colormap/); the same anchors as in
// backend/slides/render.py, which a test compares. coolwarm: computed by K. Moreland, "Diverging Color Maps for
// Scientific Visualization" (2009), from (59, 76, 192) to (180, 4, 38).
const ANCHORS = {
  viridis:
    "440154470d6048186a482374472d7b4537814240863e49893b528b375b8d33638d2f6b8e2c728e297a8e26828e23898e21918c" +
    "1f978b1f9f8821a68527ad8131b57b3dbc744cc26c5cc8636ece5881d34d95d840aadc32c0df25d5e21aeae51afde725",
  magma:
    "0000040303120a0822130d341d114729115a36106b440f7651127c5d177f6a1c81762181832681902a819c2e7faa337db73779" +
    "c23b75cf4070db476ae55064ee5b5ef4695cf9785dfb8761fd9668fea571feb47bfec287fed194fde0a1fceeb0fcfdbf",
  coolwarm:
    "3b4cc0445acc4e68d75875e16282ea6c8ef1779af782a5fb8db0fe98b9ffa3c2ffaec9fdb8d0f9c2d5f4ccd9eed5dbe6dddddd" +
    "e5d8d1ecd3c6f1ccb9f5c4adf7bba0f7b194f7a687f49a7bf18d6fec7f63e57057de614cd55042cb3e38c0282fb40426",
};

const tables = new Map();

/** Uint8Array of 256 × 3: a colour map, low to high. */
export function colourTable(name) {
  if (!tables.has(name)) tables.set(name, interpolated(ANCHORS[name]));
  return tables.get(name);
}

function interpolated(hex) {
  const anchors = hex.match(/../g).map((pair) => parseInt(pair, 16));
  const last = anchors.length / 3 - 1;
  const table = new Uint8Array(256 * 3);
  for (let value = 0; value < 256; value += 1) {
    const at = (value / 255) * last;
    const low = Math.min(Math.floor(at), last - 1);
    for (let channel = 0; channel < 3; channel += 1) {
      const a = anchors[3 * low + channel];
      table[3 * value + channel] = Math.round(a + (at - low) * (anchors[3 * low + 3 + channel] - a));
    }
  }
  return table;
}
