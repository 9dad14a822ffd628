// Where we are: a reverse proxy may have a path in front of ours. Files like this one lie two folders below it.

/** The address of one of our paths, such as `/panel/state`. */
export const below = (path) => new URL(`../..${path}`, import.meta.url).href;
