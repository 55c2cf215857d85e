-- Where one run's files lie: the only file of this folder that names paths.
--
-- Grain:   as stored; one view for each table of the disk contract (data/README.md).
-- Reads:   the explicit Parquet files of one published generation, never a glob.
-- Units:   as stored.
-- Ask it:  nothing; everything else reads these views.
--
-- Each `$$name` below is filled in with a DuckDB list. To work by hand in the duckdb shell, let
-- `saeflow sql --script` print this file filled in, followed by the rest of the folder.
create or replace view src_tokens as
select * from read_parquet($tokens);

create or replace view src_documents as
select * from read_parquet($documents, union_by_name = true);

create or replace view src_hidden as
select unnest($hidden::bigint[]) as document_id;

create or replace view src_vocab as
select * from read_parquet($vocab);

create or replace view src_feature_major as
select * from read_parquet($feature_major);

create or replace view src_token_major as
select * from read_parquet($token_major);

create or replace view src_feature_stats as
select * from read_parquet($feature_stats, filename = true);

create or replace view src_runs as
select unnest($runs, recursive := true);
