-- The folder of the part that a file of statistics belongs to.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   the name of the last folder on the way to the file, as in the store: <index>-<hash>.
-- Ask it:  select part_folder('store/features/demo/parts/000003-0a1b2c3d/feature_stats.parquet')
create or replace macro part_folder(filename) as
split_part((filename), '/', -2);
