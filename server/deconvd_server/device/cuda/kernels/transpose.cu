// Transposes a batch of matrices: images to channels-last layout and back.

// A tile is a square of TILE x TILE elements. A block's threads move it in vectors of 16 bytes.
//
// Macros, from elementwise.py: ELEMENT, THREADS, TILE.

constexpr int WIDTH = 16 / sizeof(ELEMENT);
constexpr int PITCH = TILE + (sizeof(ELEMENT) == 2 ? 2 : 1);  // an odd number of banks

using Index = long long;

__device__ void load_tile(ELEMENT (*tile)[PITCH], const ELEMENT *matrix, Index rows, Index columns, Index row,
                          Index column)
{
    if (is_aligned(matrix) && columns % WIDTH == 0) {
        for (int i = threadIdx.x; i < TILE * TILE / WIDTH; i += THREADS) {
            const int r = i / (TILE / WIDTH), c = i % (TILE / WIDTH) * WIDTH;
            if (row + r >= rows || column + c >= columns) continue;
            const auto elements = *(const Vector<ELEMENT, WIDTH> *)(matrix + (row + r) * columns + column + c);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) tile[r][c + j] = elements.values[j];
        }
    } else {
        for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
            const int r = i / TILE, c = i % TILE;
            if (row + r < rows && column + c < columns) tile[r][c] = matrix[(row + r) * columns + column + c];
        }
    }
}

// Stores the transpose of the tile at (row, column) of a matrix that is `columns` wide.
__device__ void store_tile(const ELEMENT (*tile)[PITCH], ELEMENT *matrix, Index rows, Index columns, Index row,
                           Index column)
{
    if (is_aligned(matrix) && columns % WIDTH == 0) {
        for (int i = threadIdx.x; i < TILE * TILE / WIDTH; i += THREADS) {
            const int r = i / (TILE / WIDTH), c = i % (TILE / WIDTH) * WIDTH;
            if (row + r >= rows || column + c >= columns) continue;
            Vector<ELEMENT, WIDTH> elements;
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) elements.values[j] = tile[c + j][r];
            *(Vector<ELEMENT, WIDTH> *)(matrix + (row + r) * columns + column + c) = elements;
        }
    } else {
        for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
            const int r = i / TILE, c = i % TILE;
            if (row + r < rows && column + c < columns) matrix[(row + r) * columns + column + c] = tile[c][r];
        }
    }
}

// Transposes squares of WIDTH x WIDTH elements in registers, loaded and stored as vectors.
//
// A warp takes up to 8 squares, one below the other, so that the vectors that it stores are next to each other too.
__device__ void transpose_squares(const ELEMENT *source, ELEMENT *target, Index batch, Index rows, Index columns)
{
    const Index row_squares = rows / WIDTH, column_squares = columns / WIDTH;
    const int lanes = row_squares >= 8 ? 8 : row_squares >= 4 ? 4 : row_squares >= 2 ? 2 : 1;
    const Index row_groups = (row_squares + lanes - 1) / lanes, count = batch * row_groups * column_squares;
    const int lane = threadIdx.x % lanes;
    for (Index i = (Index)blockIdx.x * (THREADS / lanes) + threadIdx.x / lanes; i < count;
         i += (Index)gridDim.x * (THREADS / lanes)) {
        const Index column = i % column_squares * WIDTH, group = i / column_squares;
        const Index row = (group % row_groups * lanes + lane) * WIDTH, offset = group / row_groups * rows * columns;
        if (row >= rows) continue;
        Vector<ELEMENT, WIDTH> from[WIDTH];
#pragma unroll
        for (int j = 0; j < WIDTH; ++j)
            from[j] = *(const Vector<ELEMENT, WIDTH> *)(source + offset + (row + j) * columns + column);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            Vector<ELEMENT, WIDTH> to;
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) to.values[k] = from[k].values[j];
            *(Vector<ELEMENT, WIDTH> *)(target + offset + (column + j) * rows + row) = to;
        }
    }
}

// Transposes matrices of few rows: a thread takes one vector of each row, and stores their columns one after the other.
template <int ROWS> __device__ void spread_rows(const ELEMENT *source, ELEMENT *target, Index batch, Index columns)
{
    const Index vectors = columns / WIDTH;
    for (Index i = (Index)blockIdx.x * THREADS + threadIdx.x; i < batch * vectors; i += (Index)gridDim.x * THREADS) {
        const Index matrix = i / vectors, column = i % vectors * WIDTH;
        Vector<ELEMENT, WIDTH> from[ROWS], to[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
            from[row] = *(const Vector<ELEMENT, WIDTH> *)(source + (matrix * ROWS + row) * columns + column);
#pragma unroll
        for (int j = 0; j < ROWS * WIDTH; ++j) to[j / WIDTH].values[j % WIDTH] = from[j % ROWS].values[j / ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
            *(Vector<ELEMENT, WIDTH> *)(target + (matrix * columns + column) * ROWS + row * WIDTH) = to[row];
    }
}

// The inverse: transposes matrices of few columns.
template <int COLUMNS> __device__ void gather_rows(const ELEMENT *source, ELEMENT *target, Index batch, Index rows)
{
    const Index vectors = rows / WIDTH;
    for (Index i = (Index)blockIdx.x * THREADS + threadIdx.x; i < batch * vectors; i += (Index)gridDim.x * THREADS) {
        const Index matrix = i / vectors, row = i % vectors * WIDTH;
        Vector<ELEMENT, WIDTH> from[COLUMNS], to[COLUMNS];
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
            from[column] = *(const Vector<ELEMENT, WIDTH> *)(source + (matrix * rows + row) * COLUMNS + column * WIDTH);
#pragma unroll
        for (int j = 0; j < COLUMNS * WIDTH; ++j) to[j % COLUMNS].values[j / COLUMNS] = from[j / WIDTH].values[j % WIDTH];
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
            *(Vector<ELEMENT, WIDTH> *)(target + (matrix * COLUMNS + column) * rows + row) = to[column];
    }
}

// Transposes tiles through shared memory, for matrices and pointers of any kind.
__device__ void transpose_tiles(const ELEMENT *source, ELEMENT *target, Index batch, Index rows, Index columns)
{
    __shared__ ELEMENT tile[TILE][PITCH];
    const Index column_tiles = (columns + TILE - 1) / TILE, row_tiles = (rows + TILE - 1) / TILE;
    for (Index i = blockIdx.x; i < batch * row_tiles * column_tiles; i += gridDim.x) {
        const Index row = i / column_tiles % row_tiles * TILE, column = i % column_tiles * TILE;
        const Index offset = i / column_tiles / row_tiles * rows * columns;
        load_tile(tile, source + offset, rows, columns, row, column);
        __syncthreads();
        store_tile(tile, target + offset, columns, rows, column, row);
        __syncthreads();
    }
}

// Sets target, of shape (batch, columns, rows), to the transpose of source, of shape (batch, rows, columns).
extern "C" __global__ void __launch_bounds__(THREADS)
transpose(const ELEMENT *source, ELEMENT *target, Index batch, Index rows, Index columns)
{
    const bool aligned = is_aligned(source) && is_aligned(target);
    const bool whole_rows = aligned && columns % WIDTH == 0, whole_columns = aligned && rows % WIDTH == 0;
    if (whole_rows && rows == 2)
        spread_rows<2>(source, target, batch, columns);
    else if (whole_rows && rows == 3)
        spread_rows<3>(source, target, batch, columns);
    else if (whole_rows && rows == 4)
        spread_rows<4>(source, target, batch, columns);
    else if (whole_columns && columns == 2)
        gather_rows<2>(source, target, batch, rows);
    else if (whole_columns && columns == 3)
        gather_rows<3>(source, target, batch, rows);
    else if (whole_columns && columns == 4)
        gather_rows<4>(source, target, batch, rows);
    else if (whole_rows && whole_columns)
        transpose_squares(source, target, batch, rows, columns);
    else
        transpose_tiles(source, target, batch, rows, columns);
}
