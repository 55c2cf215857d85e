-- True; an error if an earlier saeflow made a part of the run, because it stored no sample.
--
-- Grain:   scalar.
-- Reads:   src_shape
-- Units:   nothing
-- Ask it:  select every_part_has_sample()
create or replace macro every_part_has_sample() as
case
    when (select has_sample from src_shape) then true
    else error('parts of this run are of an earlier saeflow, which stored no sample: saeflow compact stores it')
end;
