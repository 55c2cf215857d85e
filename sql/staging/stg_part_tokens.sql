-- The tokens of each part of the corpus, and the part of the run that holds their values.
--
-- Grain:   one row per encoded part of the tokens; none where the records of an earlier saeflow do not say which tokens
--          a part has.
-- Reads:   src_parts
-- Units:   part counts from 0 in the order of the corpus and never changes; the part has the tokens first_token_id to
--          end_token_id - 1, padding too. folder is that of the run's part: compaction puts several into one.
-- Ask it:  which tokens are those of part 3?
create or replace view stg_part_tokens as
select part, folder, first_token_id, end_token_id from src_parts;
