-- How strongly each feature fires in each part of the run: token counts in bins of a quarter octave.
--
-- Grain:   one row per (part, feature, bin) with tokens.
-- Reads:   src_feature_histogram, part_folder
-- Units:   bins are those of stg_feature_histogram; folder is the part's.
-- Ask it:  in which parts is a value above 8?
create or replace view stg_part_histogram as
select part_folder(filename) as folder, feature_id, bin, n_tokens from src_feature_histogram;
