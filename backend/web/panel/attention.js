// The attention of a bag in the browser: weights as they were computed, ranks for colours, smoothing for the eye only.

/** The tiles and weights of one bag, out of the block that /panel/weights answers with. */
export class Attention {
  /** @param {ArrayBuffer} block @param {{tiles: number, heads: number, columns: number, rows: number, tile_size: number}} result */
  constructor(block, result) {
    const n = result.tiles;
    Object.assign(this, { tiles: n, heads: result.heads, columns: result.columns, rows: result.rows, tileSize: result.tile_size });
    this.column = new Int32Array(block, 0, n);
    this.row = new Int32Array(block, 4 * n, n);
    this.weights = new Float32Array(block, 8 * n, (result.heads + 1) * n);
    this.cell = new Int32Array(result.columns * result.rows).fill(-1);
    for (let i = 0; i < n; i += 1) this.cell[this.row[i] * this.columns + this.column[i]] = i;
    this.remembered = new Map();
  }

  /** Weights of a head, -1 for the mean: they sum to 1. */
  of(head) {
    return this.weights.subarray((head + 1) * this.tiles, (head + 2) * this.tiles);
  }

  /** Percentile ranks in [0, 1], equal weights equal ranks: as backend/results/ranks.py. */
  ranks(head) {
    return this.once(`ranks ${head}`, () => {
      const { order, values } = this.sorted(head);
      const n = this.tiles;
      const ranks = new Float32Array(n).fill(0.5);
      if (n < 2) return ranks;
      for (let start = 0; start < n; ) {
        let end = start + 1;
        while (end < n && values[order[end]] === values[order[start]]) end += 1;
        const rank = (start + (end - start - 1) / 2) / (n - 1);
        for (let i = start; i < end; i += 1) ranks[order[i]] = rank;
        start = end;
      }
      return ranks;
    });
  }

  /** Ranks averaged with those of the neighbours, binomially (1 2 1 in each direction), over the tiles that there are. */
  smoothed(head) {
    return this.once(`smoothed ${head}`, () => {
      const ranks = this.ranks(head);
      const smooth = new Float32Array(this.tiles);
      for (let i = 0; i < this.tiles; i += 1) {
        let sum = 0;
        let share = 0;
        for (let dy = -1; dy <= 1; dy += 1) {
          for (let dx = -1; dx <= 1; dx += 1) {
            const neighbour = this.at(this.column[i] + dx, this.row[i] + dy);
            if (neighbour < 0) continue;
            const weight = (2 - Math.abs(dx)) * (2 - Math.abs(dy));
            sum += weight * ranks[neighbour];
            share += weight;
          }
        }
        smooth[i] = sum / share;
      }
      return smooth;
    });
  }

  /** Numbers of the tiles with the highest weights of a head, highest first. */
  hottest(head, count) {
    return Array.from(this.sorted(head).order.slice(-count)).reverse();
  }

  /** Number of the tile in a cell of the grid, -1 if there is none. */
  at(column, row) {
    if (column < 0 || row < 0 || column >= this.columns || row >= this.rows) return -1;
    return this.cell[row * this.columns + column];
  }

  /** Level-0 x and y of a tile's corner: as backend/results/bag.py, computed from the column, so that rounding never adds up. */
  corner(tile) {
    return [Math.round(this.column[tile] * this.tileSize), Math.round(this.row[tile] * this.tileSize)];
  }

  sorted(head) {
    return this.once(`sorted ${head}`, () => {
      const values = this.of(head);
      // Of equal weights the earlier tile is the hotter, as on the server.
      return { values, order: Int32Array.from(values.keys()).sort((a, b) => values[a] - values[b] || b - a) };
    });
  }

  once(name, make) {
    if (!this.remembered.has(name)) this.remembered.set(name, make());
    return this.remembered.get(name);
  }
}
